"""MLX's kernels that do the same work, run from the headers of the installed wheel.

gpt-oss in mlx-lm gets `fp_gather_qmv` for its experts (2880 columns fail the fast form's test),
`affine_qmv` for q8 dense matrices, and `sdpa_vector` for decode attention with sinks.
"""

import mlx.core as mx
import numpy as np

from benchmarks.traffic import Row, row_of
from mlx_gptoss.kernels.inputs import Sizes
from mlx_gptoss.metal.emulator import Buffer, Report
from tests.emulator.mlx_kernels import buffer, empty, ints, kernel, launch

FP = ("steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h")
AFFINE = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
FLAGS = {"has_mask": False, "query_transposed": False, "do_causal": False,
         "bool_mask": False, "float_mask": False, "has_sinks": True}  # fmt: skip


def measure_mlx(model: Sizes, long: Sizes) -> dict[str, Row]:
    """Counters of MLX's kernels, under the names of ours."""
    experts = _experts(model)
    return {
        "experts_swiglu (one projection)": experts,
        "experts_down (no sum)": experts,
        "out_residual q8": _dense(model),
        "attention_decode 8k": _attention(8192, model),
        "attention_decode 32k": _attention(long.base + long.slot + 1, model),
    }


def _row(report: Report, ideal: float, *streams: str) -> Row:
    return row_of(report, ideal, streams)


def _experts(sizes: Sizes) -> Row:
    """`fp_gather_qmv`: the rows of 4 experts times one vector, 8 rows a threadgroup."""
    rows, columns, experts = sizes.inter, sizes.hidden, sizes.experts
    random = np.random.default_rng(0)
    weight = random.integers(0, 2**32, (experts, rows, columns // 8), dtype=np.uint32)
    scales = random.integers(118, 122, (experts, rows, columns // 32)).astype(np.uint8)
    made = kernel("fp_gather_qmv<bfloat16_t, 32, 4>", *FP)
    packed = rows * columns // 8
    one = Buffer.of(np.array([1], np.int64))
    after = [
        buffer(mx.zeros((1, columns), mx.bfloat16)),
        Buffer.of(np.zeros(4, np.uint32)),
        Buffer.of(np.array([3, 0, 4, 1], np.uint32)),
        empty((4, rows), mx.bfloat16),
        ints(columns),
        ints(rows),
        ints(1),
        ints(1, 1, columns),
        ints(columns, columns, 1, dtype="int64"),
        ints(1),
        ints(experts, rows, packed // rows),
        ints(packed, packed // rows, 1, dtype="int64"),
        ints(rows * columns // 32, columns // 32, 1, dtype="int64"),
        ints(1),
        Buffer.of(np.array([4], np.int32)),
        one,
        one,
    ]
    bound = {0: Buffer.of(weight), 1: Buffer.of(scales)}
    bound |= {3 + i: b for i, b in enumerate(after)}
    report = launch(made, bound, (1, rows // 8, 4), (32, 2, 1), threadgroups=32)
    return _row(report, 4 * rows * (columns // 2 + columns // 32), "w", "scales")


def _dense(sizes: Sizes) -> Row:
    """`affine_qmv` of the attention's output projection."""
    rows, columns = sizes.hidden, sizes.q_heads * 64
    w, scales, biases = mx.quantize(mx.random.normal((rows, columns)), group_size=64, bits=8)
    made = kernel("affine_qmv_fast<bfloat16_t, 64, 8, false>", *AFFINE)
    parts = [w, scales.astype(mx.bfloat16), biases.astype(mx.bfloat16)]
    bound = {i: buffer(a) for i, a in enumerate(parts)} | {
        3: buffer(mx.zeros((1, columns), mx.bfloat16)),
        4: empty((1, rows), mx.bfloat16),
        5: ints(columns),
        6: ints(rows),
    }
    report = launch(made, bound, (1, rows // 8, 1), (32, 2, 1), threadgroups=32)
    return _row(report, sum(a.nbytes for a in parts), "w", "scales", "biases")


def _attention(keys: int, sizes: Sizes) -> Row:
    """`sdpa_vector`: one threadgroup of 1024 for each query head."""
    heads, kv_heads = sizes.q_heads, sizes.kv_heads
    made = kernel("sdpa_vector<bfloat16_t, 64, 64>", "sdpa_vector.h", **FLAGS)
    kv = mx.zeros((1, kv_heads, keys, 64), mx.bfloat16)
    bound = {
        0: buffer(mx.zeros((1, heads, 1, 64), mx.bfloat16)),
        1: buffer(kv),
        2: buffer(kv),
        3: empty((1, heads, 1, 64), mx.bfloat16),
        4: ints(heads // kv_heads),
        5: ints(keys),
    }
    strides = (keys * 64, 64, keys * 64, 64)
    bound |= {6 + i: ints(value, dtype="uint64") for i, value in enumerate(strides)}
    bound |= {10: Buffer.of(np.float32(0.125)), 16: buffer(mx.zeros((heads,), mx.bfloat16))}
    bound |= {17: ints(heads)}
    report = launch(made, bound, (heads, 1, 1), (1024, 1, 1), threadgroups=2)
    return _row(report, keys * 2 * kv_heads * 64 * 2, "keys", "values")
