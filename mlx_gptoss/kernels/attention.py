"""The attention kernels: of a decode step over a frozen and an append segment, and of a chunk.

The segments are pairs of keys and values, (B, Hkv, rows, 64) each. The control row says which rows
count: frozen rows [0, base) hold positions 0..base-1 (in a ring: row p % W holds position p),
append rows [0, slot] hold positions base..base+slot, the last of them the current token's.
"""

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, HEAD_DIM, expect, launch, number, require
from mlx_gptoss.kernels.projections import CONTROL, Segment

LOG2_E = 1.4426950408889634
TILE = 32  # keys of a simdgroup's step
DECODE_SIMDGROUPS = 4
WINDOW_SIMDGROUPS = 8
PREFILL_SIMDGROUPS = 8


def splits_for(capacity: int) -> int:
    """Ranges that the keys of a cache of this capacity are cut into: 256 keys or more each, <= 32.

    With 8 KV heads 32 splits are 256 threadgroups, enough for 80 cores, and the partial results
    are 3% of the K,V bytes at 8k and 0.2% at 128k. A power of two: six traces at most.
    """
    return 1 << max(0, min(5, (capacity // (8 * TILE)).bit_length() - 1))


def _segments(
    stem: str, q: mx.array, frozen: Segment, append: Segment, control: mx.array
) -> tuple[int, int, int]:
    """Check what both kernels take; return KV heads, query heads of each, append rows."""
    batch, q_heads = q.shape[:2]
    kv_heads, rows = append[0].shape[1:3]
    expect(stem, "q", q, (batch, q_heads, HEAD_DIM), *FLOATS)
    for name, segment, count in (("frozen", frozen, frozen[0].shape[2]), ("append", append, rows)):
        for part, array in zip(("keys", "values"), segment, strict=True):
            expect(stem, f"{name} {part}", array, (batch, kv_heads, count, HEAD_DIM), q.dtype)
    expect(stem, "control", control, (batch, CONTROL), mx.int32)
    _require_heads(stem, q_heads, kv_heads)
    return kv_heads, q_heads // kv_heads, rows


def _require_heads(stem: str, q_heads: int, kv_heads: int) -> None:
    good = q_heads % kv_heads == 0 and q_heads <= 8 * kv_heads
    expected = f"a multiple of {kv_heads}, at most 8 for each KV head"
    require(stem, good, "query heads", expected, q_heads)


def _named(name: str, segment: Segment) -> dict[str, mx.array]:
    return {f"{name}_k": segment[0], f"{name}_v": segment[1]}


def attention_decode(
    q: mx.array, frozen: Segment, append: Segment, *, control: mx.array, splits: int, scale: float
) -> tuple[mx.array, mx.array]:
    """One token's attention over the whole cache, in `splits` parts for `attention_reduce`.

    Args:
        q: (B, Hq, 64).
        frozen: keys and values (B, Hkv, C, 64) in the type of q, C > 0.
        append: keys and values (B, Hkv, R, 64) in the type of q.
        control: (B, 8) int32: position, base <= C, slot < R.
        splits: S.
        scale: of q . k.

    Returns:
        sums (B, Hq, S, 64) and ends (B, Hq, S, 2) float32: for each split the weighted sum of
        values, the largest score (in log2 units) and the sum of weights.
    """
    stem = "attention_decode"
    kv_heads, group, rows = _segments(stem, q, frozen, append, control)
    require(stem, splits > 0, "splits", "at least 1", splits)
    # MLX passes an empty array as `constant`, which the kernel does not take
    require(stem, frozen[0].shape[2] > 0, "frozen rows", "at least 1", 0)
    batch, heads = q.shape[:2]
    body = (
        f"threadgroup float shared_sums[{512 * DECODE_SIMDGROUPS}];\n"
        f"threadgroup float shared_ends[{16 * DECODE_SIMDGROUPS}];\n"
        f"attention_decode<{kv_heads}, {group}, {rows}, {DECODE_SIMDGROUPS}>(q, frozen_k, "
        "frozen_v, append_k, append_v, control, sums, ends, shared_sums, shared_ends, "
        f"{number(scale * LOG2_E)}, frozen_k_shape[2], threadgroups_per_grid.y, "
        "$tile, $thread_id, $lane, $group);"
    )
    sums, ends = launch(
        stem,
        {"q": q, **_named("frozen", frozen), **_named("append", append), "control": control},
        {
            "sums": ((batch, heads, splits, HEAD_DIM), mx.float32),
            "ends": ((batch, heads, splits, 2), mx.float32),
        },
        body=body,
        groups=(kv_heads, splits, batch),
        threads=32 * DECODE_SIMDGROUPS,
    )
    return sums, ends


def attention_reduce(
    sums: mx.array, ends: mx.array, sinks: mx.array, *, dtype: mx.Dtype
) -> mx.array:
    """Join the splits of `attention_decode` and put the sinks into the denominator.

    Args:
        sums: (B, Hq, S, 64) float32.
        ends: (B, Hq, S, 2) float32.
        sinks: (Hq,), at least 8.
        dtype: of the result.

    Returns:
        (B, Hq*64) of `dtype`.
    """
    stem = "attention_reduce"
    batch, heads, splits = sums.shape[:3]
    expect(stem, "sums", sums, (batch, heads, splits, HEAD_DIM), mx.float32)
    expect(stem, "ends", ends, (batch, heads, splits, 2), mx.float32)
    expect(stem, "sinks", sinks, (heads,), *FLOATS)
    require(stem, heads >= 8, "query heads", "at least 8 (MLX passes fewer as `constant`)", heads)
    (y,) = launch(
        stem,
        {"sums": sums, "ends": ends, "sinks": sinks},
        {"y": ((batch, heads * HEAD_DIM), dtype)},
        body=f"attention_reduce<{heads}>(sums, ends, sinks, y, sums_shape[2], $tile, $thread_id);",
        groups=(heads, batch, 1),
        threads=HEAD_DIM,
    )
    return y


def attention_window(
    q: mx.array,
    ring: Segment,
    append: Segment,
    sinks: mx.array,
    *,
    control: mx.array,
    scale: float,
) -> mx.array:
    """One token's attention over the last W positions, itself included.

    Args:
        q: (B, Hq, 64).
        ring: keys and values (B, Hkv, W, 64) in the type of q; row p % W holds position p < base.
        append: keys and values (B, Hkv, R, 64) in the type of q.
        sinks: (Hq,), at least 8.
        control: (B, 8) int32: position, base, slot < R.
        scale: of q . k.

    Returns:
        (B, Hq*64) in the type of q.
    """
    stem = "attention_window"
    kv_heads, group, rows = _segments(stem, q, ring, append, control)
    (batch, heads), window = q.shape[:2], ring[0].shape[2]
    expect(stem, "sinks", sinks, (heads,), *FLOATS)
    require(stem, heads >= 8, "query heads", "at least 8 (MLX passes fewer as `constant`)", heads)
    require(stem, window % TILE == 0, "window", f"a multiple of {TILE}", window)
    body = (
        f"threadgroup float shared_sums[{512 * WINDOW_SIMDGROUPS}];\n"
        f"threadgroup float shared_ends[{16 * WINDOW_SIMDGROUPS}];\n"
        f"attention_window<{kv_heads}, {group}, {window}, {rows}, {WINDOW_SIMDGROUPS}>"
        f"(q, ring_k, ring_v, append_k, append_v, control, sinks, y, shared_sums, shared_ends, "
        f"{number(scale * LOG2_E)}, $tile, $thread_id, $lane, $group);"
    )
    (y,) = launch(
        stem,
        {
            "q": q,
            **_named("ring", ring),
            **_named("append", append),
            "control": control,
            "sinks": sinks,
        },
        {"y": ((batch, heads * HEAD_DIM), q.dtype)},
        body=body,
        groups=(kv_heads, batch, 1),
        threads=32 * WINDOW_SIMDGROUPS,
    )
    return y


def attention_window_prefill(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    sinks: mx.array,
    *,
    scale: float,
    offset: int,
    start: mx.array | None,
) -> mx.array:
    """Attention of a chunk, each token over the last W positions, itself included.

    Args:
        q: (B, Hq, T, 64), at positions offset..offset+T-1.
        keys: (B, Hkv, W + T, 64) in the type of q: the W positions before `offset` (anything, where
            there are none) and the new ones.
        values: as `keys`.
        sinks: (Hq,), at least 8.
        scale: of q . k.
        offset: position of the first query.
        start: (B,) int32, first position of each row that is not padding; None without padding.

    Returns:
        (B, T, Hq*64) in the type of q.
    """
    stem = "attention_window_prefill"
    (batch, heads, tokens, _), (kv_heads, rows) = q.shape, keys.shape[1:3]
    window, group = rows - tokens, heads // kv_heads
    expect(stem, "q", q, (batch, heads, tokens, HEAD_DIM), *FLOATS)
    for name, array in (("keys", keys), ("values", values)):
        expect(stem, name, array, (batch, kv_heads, rows, HEAD_DIM), q.dtype)
    expect(stem, "sinks", sinks, (heads,), *FLOATS)
    _require_heads(stem, heads, kv_heads)
    require(stem, heads >= 8, "query heads", "at least 8 (MLX passes fewer as `constant`)", heads)
    good = window > 0 and window % TILE == 0
    require(stem, good, "keys", f"T and a multiple of {TILE} before", rows)
    before = window - offset  # rows before position 0
    first = mx.array([before] * batch, mx.int32) if start is None else start + before
    row_chunks = HEAD_DIM * q.dtype.size // 16 + 1  # of 16 bytes, one of them padding
    body = (
        f"threadgroup uint4 tiles[{2 * TILE * row_chunks}];\n"
        f"attention_window_prefill<{kv_heads}, {group}, {window}, {PREFILL_SIMDGROUPS}>(q, keys, "
        f"values, sinks, first, y, tiles, {number(scale * LOG2_E)}, q_shape[2], $tile, $thread_id, "
        "$lane, $group);"
    )
    (y,) = launch(
        stem,
        {
            "q": q,
            "keys": keys,
            "values": values,
            "sinks": sinks,
            "first": first,
        },
        {"y": ((batch, tokens, heads * HEAD_DIM), q.dtype)},
        body=body,
        groups=(-(-tokens // PREFILL_SIMDGROUPS), kv_heads, batch),
        threads=32 * PREFILL_SIMDGROUPS,
    )
    return y
