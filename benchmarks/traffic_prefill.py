"""Sliding attention of a chunk: our kernel beside MLX's attention kernel, both counted.

MLX's kernel (`steel/attn`, the one for GPUs before the M5) takes one head's 32 queries a
threadgroup, and an array says which keys they see. It can be called in three forms:

    one call        T queries, T + 128 keys, as mlx-lm does
    blocks of 128   each with 256 keys
    blocks of 32    each with 160 keys: the shortest that its tiles of 32 keys allow

The block forms are taken as strided views that cost nothing, so only T a multiple of the block is
counted: more would be copied. On an M5 MLX has another kernel, on units that no counter here knows.
"""

import struct
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from benchmarks.traffic import MODEL
from mlx_gptoss.kernels.inputs import Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.metal.emulator import Buffer, Report, emulate
from tests.emulator.mlx_kernels import buffer, empty, kernel, launch

CHUNKS = (128, 512, 2048)
SAMPLED = 8  # threadgroups, evenly spread
QUERIES = KEYS = 32  # of a tile of MLX's kernel
STEEL = f"attention<bfloat16_t, {QUERIES}, {KEYS}, 64, 64, 4, 1, bool, float>"
FLAGS = {"align_Q": True, "align_K": True, "has_mask": True, "do_causal": False,
         "has_sinks": True, "save_lse": False}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WindowRow:
    """Counters of one chunk.

    Attributes:
        threadgroups: of the dispatch.
        threads: of a threadgroup.
        threadgroup_bytes: of its memory.
        distinct_ratio: 32-byte sectors of K and V that threadgroups touch, over those there are.
        instruction_ratio: the same, each load instruction's counted.
        products_ratio: 8x8 matrix products over those of 128 keys a token.
        simd: shuffles and reductions for a token and KV head.
        threadgroup_kib: read from threadgroup memory for a token and KV head.
    """

    threadgroups: int
    threads: int
    threadgroup_bytes: int
    distinct_ratio: float
    instruction_ratio: float
    products_ratio: float
    simd: float
    threadgroup_kib: float


def compare_chunks() -> dict[str, WindowRow]:
    """All forms at all lengths of `CHUNKS`."""
    rows = {}
    for tokens in CHUNKS:
        sizes = replace(MODEL, tokens=tokens)
        rows[f"{tokens} tokens, ours"] = ours(sizes)
        rows[f"{tokens} tokens, MLX in blocks of 32"] = steel(sizes, block=32)
        rows[f"{tokens} tokens, MLX in blocks of 128"] = steel(sizes, block=128)
        rows[f"{tokens} tokens, MLX in one call"] = steel(sizes, block=tokens)
    return rows


def ours(sizes: Sizes) -> WindowRow:
    """`attention_window_prefill`."""
    kernel = KERNELS["attention_window_prefill"]
    given = kernel.case(Inputs(sizes, dtype=mx.bfloat16)) | {"start": None}
    with emulate(threadgroups=SAMPLED, allow=("unwritten-output",)) as session:
        kernel.launch(**given)
    return _row(session.reports[0], ("keys", "values"), sizes)


def steel(sizes: Sizes, *, block: int) -> WindowRow:
    """MLX's kernel on blocks of queries."""
    given = KERNELS["attention_window_prefill"].case(Inputs(sizes, dtype=mx.bfloat16))
    _, report = run_steel(given | {"start": None}, block=block, threadgroups=SAMPLED)
    return _row(report, ("K", "V"), sizes)


def run_steel(
    given: dict[str, mx.array], *, block: int, threadgroups: int | None
) -> tuple[Buffer, Report]:
    """Call MLX's kernel on the inputs of ours, with the parameters that MLX 0.32 gives it.

    Args:
        given: arguments of `attention_window_prefill`, one row, no padding.
        block: queries of a call; a multiple of 32 that divides T.
        threadgroups: how many to run; None for all.

    Returns:
        The output, (T, Hq, 64), and the report.
    """
    q, keys, values = (given[name] for name in ("q", "keys", "values"))
    (heads, tokens), (kv_heads, rows) = q.shape[1:3], keys.shape[1:3]
    window, blocks = rows - tokens, tokens // block
    seen_from = block + window
    query, key = mx.arange(block)[:, None], mx.arange(seen_from)[None]
    mask = (key > query) & (key <= query + window)
    tiles, key_tiles = block // QUERIES, seen_from // KEYS
    strides = [block * 64, tokens * 64, 64], [block * 64, rows * 64, 64]
    params = struct.pack(
        "<6if7i12q",
        *(blocks, heads, 64, block, seen_from, heads // kv_heads),
        float(given["scale"]),
        *(tiles, key_tiles, tiles, key_tiles, 0, 0, window),
        *(*strides[0], *strides[1], *strides[1]),
        *(block * heads * 64, 64, heads * 64),
    )
    out = empty((tokens, heads, 64), mx.bfloat16)
    bound = {i: buffer(a) for i, a in enumerate((q, keys, values))} | {
        3: out,
        4: Buffer.of(np.frombuffer(params, np.uint8), dtype=""),
        5: Buffer.of(np.array([0, 0, seen_from], np.int64).view(np.uint8), dtype=""),
        6: buffer(mask),
        7: buffer(given["sinks"]),
    }
    made = kernel(STEEL, "steel/attn/kernels/steel_attention.h", **FLAGS)
    allow = () if threadgroups is None else ("unwritten-output",)
    groups = (tiles, heads, blocks)
    report = launch(made, bound, groups, (32, 4, 1), threadgroups=threadgroups, allow=allow)
    return out, report


def _row(report: Report, streams: tuple[str, str], sizes: Sizes) -> WindowRow:
    share = report.threadgroups_run / report.threadgroups_total
    traffic, totals = [report.traffic(name) for name in streams], report.totals()
    sectors = (sizes.window + sizes.tokens) * sizes.kv_heads * 2 * 64 * 2 / 32 * share
    heads = sizes.tokens * sizes.kv_heads * share
    products = sizes.window / 8 * 16  # 8 for the scores, 8 for the values
    return WindowRow(
        threadgroups=report.threadgroups_total,
        threads=int(np.prod(report.threadgroup)),
        threadgroup_bytes=report.threadgroup_bytes,
        distinct_ratio=round(sum(t.distinct_sectors for t in traffic) / sectors, 2),
        instruction_ratio=round(sum(t.instruction_sectors for t in traffic) / sectors, 2),
        products_ratio=round(totals.matrix_operations / heads / products, 3),
        simd=round(totals.simd_operations / heads, 1),
        threadgroup_kib=round(totals.threadgroup_load_bytes / heads / 1024, 1),
    )
