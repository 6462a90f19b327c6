"""The kernels of prompts, between MLX's products: norms, rotation, rings, router, biases, sums.

Those that also need knowledge of attention or of experts are in `attention` and `experts`.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, HEAD_DIM, expect, launch, number, require
from mlx_gptoss.kernels.matrix import MOST_SIMDGROUPS, DenseMatrix, require_columns, simdgroups
from mlx_gptoss.kernels.projections import Segment
from mlx_gptoss.matrix import Matrix

THREADS = 256  # of a threadgroup, where any number would do
COLUMNS = 8  # of a thread: one load of 16 bytes
MOST_COLUMNS = 1024 * COLUMNS
MOST_SHARED = 32768  # bytes of threadgroup memory


def rms_norm(x: mx.array, weight: mx.array, *, eps: float) -> mx.array:
    """RMS norm of rows.

    Args:
        x: (..., D).
        weight: (D,), no wider than x.
        eps: of the norm.

    Returns:
        x's shape and type.
    """
    stem, width = "rms_norm", x.shape[-1]
    expect(stem, "x", x, x.shape, *FLOATS)
    expect(stem, "weight", weight, (width,), *FLOATS)
    require_columns(stem, "columns", width)
    narrow = weight.dtype.size <= x.dtype.size
    require(stem, narrow, "weight", f"no wider than {x.dtype}", weight.dtype)
    groups = simdgroups(width)
    (y,) = launch(
        stem,
        {"x": x, "weight": weight},
        {"y": (x.shape, x.dtype)},
        body=f"threadgroup float sums[{groups}];\n"
        f"rms_norm<{width}>(x, weight, y, sums, {number(eps)}, $tile, $lane, $group);",
        groups=(x.size // width, 1, 1),
        threads=32 * groups,
    )
    return y


def qkv_rope(
    products: Sequence[mx.array],
    biases: Sequence[mx.array],
    angles: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Bias of queries, keys and values, and the rotation of queries and keys.

    Args:
        products: q (B, Q, Hq*64) of the last Q of T tokens; k and v (B, T, Hkv*64).
        biases: one for each, (heads*64,).
        angles: cos and sin (B, 1, T, 32) float32, of `RopeTable.at`, or (1, ...) for all rows.

    Returns:
        q (B, Hq, Q, 64), k and v (B, Hkv, T, 64), in the type of the products.
    """
    stem, (q, k, v) = "qkv_rope", products
    (batch, queries, q_width), (tokens, kv_width) = q.shape, k.shape[1:]
    for name, array, width in (("q", q, q_width), ("k", k, kv_width), ("v", v, kv_width)):
        require(stem, width % HEAD_DIM == 0, f"{name} columns", "whole heads of 64", width)
        shape = (batch, queries if name == "q" else tokens, width)
        expect(stem, name, array, shape, *([q.dtype] if name != "q" else FLOATS))
    require(stem, queries <= tokens, "queries", f"at most {tokens}", queries)
    for name, bias, width in zip("qkv", biases, (q_width, kv_width, kv_width), strict=True):
        expect(
            stem, f"{name} bias", bias, (width,), *([biases[0].dtype] if name != "q" else FLOATS)
        )
    for name, angle in zip(("cosines", "sines"), angles, strict=True):
        rows = 1 if angle.shape[0] == 1 else batch
        expect(stem, name, angle, (rows, 1, tokens, HEAD_DIM // 2), mx.float32)
    q_heads, kv_heads = q_width // HEAD_DIM, kv_width // HEAD_DIM
    inputs = {"q": q, "k": k, "v": v, "bq": biases[0], "bk": biases[1], "bv": biases[2]}
    inputs |= {"cosines": angles[0], "sines": angles[1]}
    rotated = launch(
        stem,
        inputs,
        {
            "new_q": ((batch, q_heads, queries, HEAD_DIM), q.dtype),
            "new_k": ((batch, kv_heads, tokens, HEAD_DIM), q.dtype),
            "new_v": ((batch, kv_heads, tokens, HEAD_DIM), q.dtype),
        },
        body=f"qkv_rope<{q_heads}, {kv_heads}>({', '.join(inputs)}, new_q, new_k, new_v, "
        f"q_shape[1], k_shape[1], cosines_shape[0], $tile, $thread_id, {THREADS});",
        groups=(-(-4 * (q_heads + 2 * kv_heads) // THREADS), tokens, batch),
        threads=THREADS,
    )
    return rotated[0], rotated[1], rotated[2]


def extend_ring(ring: Segment, new: Segment, *, offset: int) -> tuple[Segment, Segment]:
    """The positions that a chunk sees in a sliding layer, and the ring after it.

    Args:
        ring: keys and values (B, Hkv, W, 64); position p lies in row p % W.
        new: those of the chunk, (B, Hkv, T, 64).
        offset: position of the chunk's first token.

    Returns:
        The W positions before `offset` (what the ring has, where there are none) and the new ones,
        (B, Hkv, W + T, 64) each; and the ring.
    """
    stem, dtype = "extend_ring", ring[0].dtype
    (batch, heads, window, _), tokens = ring[0].shape, new[0].shape[2]
    inputs: dict[str, mx.array] = {}
    for name, segment, rows in (("ring", ring, window), ("new", new, tokens)):
        for part, array in zip(("keys", "values"), segment, strict=True):
            expect(stem, f"{name} {part}", array, (batch, heads, rows, HEAD_DIM), dtype)
            inputs[f"{name}_{part}"] = array
    require(stem, dtype in FLOATS, "type", "a float", dtype)
    inputs["offset"] = mx.array([offset], mx.int32)
    chunks = HEAD_DIM * dtype.size // 16
    ordered, slots = (batch, heads, window + tokens, HEAD_DIM), ring[0].shape
    keys, values, ring_keys, ring_values = launch(
        stem,
        inputs,
        {
            "keys": (ordered, dtype),
            "values": (ordered, dtype),
            "next_keys": (slots, dtype),
            "next_values": (slots, dtype),
        },
        body=f"extend_ring<{window}>({', '.join(inputs)}, keys, values, next_keys, next_values, "
        f"new_keys_shape[2], $tile, $thread_id, {THREADS});",
        groups=(-(-(window + tokens) * chunks // THREADS), batch * heads, 1),
        threads=THREADS,
    )
    return (keys, values), (ring_keys, ring_values)


def route_prefill(
    x: mx.array, norm: mx.array, router: Matrix, *, chosen: int, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """The norm before the experts, and the choice of experts for every token.

    Args:
        x: (N, D), the residual stream.
        norm: (D,).
        router: (E, D) with bias.
        chosen: K.
        eps: of the norm.

    Returns:
        y (N, D) in the type of x, normalised; experts (N, K) uint32, the largest logit first; their
        weights (N, K) float32.
    """
    stem = "route_prefill"
    (rows, width), experts = x.shape, router.weight.shape[0]
    expect(stem, "x", x, (rows, width), *FLOATS)
    expect(stem, "norm", norm, (width,), *FLOATS)
    require(stem, 0 < chosen <= experts, "chosen", f"1 to {experts}", chosen)
    weight = DenseMatrix(stem, "wr", router, rows=experts, columns=width)
    assert router.bias is not None
    expect(stem, "bias", router.bias, (experts,), norm.dtype)
    inputs = {"x": x, "norm": norm, **weight.inputs, "bias": router.bias}
    parts = simdgroups(width)
    blocks = min(-(-rows // 2), max(1, MOST_SIMDGROUPS // parts))
    sums, logits = 2 * blocks * parts * (experts + 1), 2 * blocks * experts
    fits = 4 * (sums + logits) <= MOST_SHARED
    require(stem, fits, "experts", f"logits in {MOST_SHARED} bytes", experts)
    body = (
        f"threadgroup float sums[{sums}];\nthreadgroup float logits[{logits}];\n"
        f"route_prefill<{width}, {experts}, {chosen}, {blocks}>(x, norm, {weight.value}, bias, y, "
        f"experts, shares, sums, logits, {number(eps)}, x_shape[0], $tile, $thread_id, $lane, "
        "$group);"
    )
    y, choice, shares = launch(
        stem,
        inputs,
        {
            "y": ((rows, width), x.dtype),
            "experts": ((rows, chosen), mx.uint32),
            "shares": ((rows, chosen), mx.float32),
        },
        body=body,
        groups=(-(-rows // (2 * blocks)), 1, 1),
        threads=32 * parts * blocks,
    )
    return y, choice, shares


def _column_threads(stem: str, width: int) -> int:
    """Threads for a row, a multiple of 32."""
    good = width % COLUMNS == 0 and width <= MOST_COLUMNS
    require(stem, good, "columns", f"a multiple of {COLUMNS}, at most {MOST_COLUMNS}", width)
    return -(-width // COLUMNS // 32) * 32


def swiglu_pairs(
    products: tuple[mx.array, mx.array],
    experts: mx.array,
    biases: tuple[mx.array, mx.array],
    *,
    alpha: float,
    limit: float,
) -> mx.array:
    """The biases of each pair's gate and up products, then the clamped SwiGLU.

    Args:
        products: gate and up, (P, 1, H) each, without bias.
        experts: (P,) uint32, the expert of each.
        biases: of gate and up, (E, H) each.
        alpha: gain of the sigmoid.
        limit: of the clamps.

    Returns:
        (P, 1, H) in the type of the products.
    """
    stem, (gate, up) = "swiglu_pairs", products
    pairs, _, width = gate.shape
    expect(stem, "gate", gate, (pairs, 1, width), *FLOATS)
    expect(stem, "up", up, (pairs, 1, width), gate.dtype)
    expect(stem, "experts", experts, (pairs,), mx.uint32)
    for name, bias in zip(("gate", "up"), biases, strict=True):
        expect(stem, f"{name} bias", bias, (bias.shape[0], width), biases[0].dtype)
    inputs = {"gate": gate, "up": up, "experts": experts}
    inputs |= {"gate_b": biases[0], "up_b": biases[1]}
    (h,) = launch(
        stem,
        inputs,
        {"h": (gate.shape, gate.dtype)},
        body=f"swiglu_pairs<{width}>({', '.join(inputs)}, h, {number(alpha)}, {number(limit)}, "
        "$tile, $thread_id);",
        groups=(pairs, 1, 1),
        threads=_column_threads(stem, width),
    )
    return h


def sum_pairs(
    z: mx.array,
    inverse: mx.array,
    choice: tuple[mx.array, mx.array],
    bias: mx.array,
    residual: mx.array,
) -> mx.array:
    """The down products of sorted pairs, biased, weighted, and added to their tokens' residual.

    Args:
        z: (P, 1, D), without bias, sorted by expert.
        inverse: (P,) uint32, the sorted place of each pair.
        choice: experts (N, K) uint32 and their weights (N, K) float32, P = N*K.
        bias: (E, D).
        residual: (N, D) in the type of z.

    Returns:
        (N, D) in the type of the residual.
    """
    stem = "sum_pairs"
    (rows, width), chosen = residual.shape, choice[0].shape[-1]
    expect(stem, "z", z, (rows * chosen, 1, width), *FLOATS)
    expect(stem, "inverse", inverse, (rows * chosen,), mx.uint32)
    expect(stem, "experts", choice[0], (rows, chosen), mx.uint32)
    expect(stem, "shares", choice[1], (rows, chosen), mx.float32)
    expect(stem, "bias", bias, (bias.shape[0], width), *FLOATS)
    expect(stem, "residual", residual, (rows, width), z.dtype)
    inputs = {"z": z, "inverse": inverse, "experts": choice[0], "shares": choice[1]}
    inputs |= {"bias": bias, "residual": residual}
    (y,) = launch(
        stem,
        inputs,
        {"y": ((rows, width), z.dtype)},
        body=f"sum_pairs<{width}, {chosen}>({', '.join(inputs)}, y, $tile, $thread_id);",
        groups=(rows, 1, 1),
        threads=_column_threads(stem, width),
    )
    return y
