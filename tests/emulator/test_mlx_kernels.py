"""The emulator against code nobody here wrote: MLX's Metal kernels, and MLX's CPU results.

Every kernel runs instrumented, so it is also a false-alarm test of every check.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.metal.emulator import Buffer
from tests.emulator.mlx_kernels import (
    ATTENTION_CONSTANTS,
    TYPE,
    buffer,
    empty,
    ints,
    kernel,
    launch,
)

TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
ORDERS = ["forward", "reverse"]


def random(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def assert_close(found: Buffer, wanted: mx.array, dtype: mx.Dtype) -> None:
    """Largest error over largest value, against the figure of the dtype."""
    mx.eval(wanted)
    reference = np.array(wanted.astype(mx.float32)).reshape(found.shape)
    error = np.abs(found.array().astype(np.float32) - reference)
    worst, mean = error.max() / np.abs(reference).max(), error.mean() / np.abs(reference).mean()
    assert worst <= TOLERANCE[dtype], f"{dtype}: max {worst:.2e}, mean {mean:.2e} relative"


def quantized(experts: int, rows: int, columns: int, mode: str, dtype: mx.Dtype):
    """Packed weights as buffers (w, scales, biases), and the call that MLX answers with."""
    weights = random(experts, rows, columns, seed=1)
    if mode == "mxfp4":
        w, scales = mx.quantize(weights, group_size=32, bits=4, mode="mxfp4")
        options = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        dense = mx.dequantize(w, scales, **options)
        return [buffer(w), buffer(scales)], dense
    bits = int(mode.removeprefix("affine"))
    w, scales, biases = mx.quantize(weights, group_size=64, bits=bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    dense = mx.dequantize(w, *wide, group_size=64, bits=bits)
    return [buffer(w), buffer(scales), buffer(biases)], dense


MODES = {"mxfp4": ("fp", "32, 4", "fp_quantized.h"), "affine8": ("affine", "64, 8", "quantized.h"),
         "affine4": ("affine", "64, 4", "quantized.h")}  # fmt: skip


def quantized_kernel(name: str, mode: str, dtype: mx.Dtype, more: str = ""):
    prefix, sizes, header = MODES[mode]
    instance = f"{prefix}_{name}<{TYPE[dtype]}, {sizes}{more}>"
    return kernel(instance, "steel/gemm/gemm.h", "quantized_utils.h", header)


@pytest.mark.parametrize(
    ("name", "mode", "dtype", "columns"),
    [
        ("qmv", "mxfp4", mx.float32, 288),
        ("qmv", "mxfp4", mx.bfloat16, 2880),
        ("qmv_fast", "mxfp4", mx.float32, 1024),
        ("qmv_fast", "mxfp4", mx.float16, 512),
        ("qmv", "affine8", mx.float32, 320),
        ("qmv_fast", "affine8", mx.bfloat16, 512),
        ("qmv", "affine4", mx.float16, 320),
        ("qmv_fast", "affine4", mx.float32, 1024),
    ],
)
def test_quantised_matvec(name: str, mode: str, dtype: mx.Dtype, columns: int) -> None:
    rows, tokens = 40, 3
    weights, dense = quantized(1, rows, columns, mode, dtype)
    x = random(tokens, columns, dtype=dtype)
    y = empty((tokens, rows), dtype)
    made = quantized_kernel(name, mode, dtype, ", false")
    after = len(weights) if mode != "mxfp4" else 3  # mxfp4 has a global scale, unused, at 2
    buffers = dict(enumerate(weights)) | {
        after: buffer(x),
        after + 1: y,
        after + 2: ints(columns),
        after + 3: ints(rows),
    }
    launch(made, buffers, (tokens, rows // 8, 1), (32, 2, 1))
    assert_close(y, x.astype(mx.float32) @ dense[0].T, dtype)


@pytest.mark.parametrize(
    ("name", "mode", "dtype", "columns"),
    [
        ("gather_qmv", "mxfp4", mx.float32, 288),
        ("gather_qmv", "mxfp4", mx.bfloat16, 2880),
        ("gather_qmv_fast", "mxfp4", mx.float32, 512),
        ("gather_qmv", "affine8", mx.float16, 320),
        ("gather_qmv_fast", "affine4", mx.float32, 512),
    ],
)
def test_quantised_matvec_of_chosen_experts(
    name: str, mode: str, dtype: mx.Dtype, columns: int
) -> None:
    experts, rows, chosen, tokens = 5, 24, [3, 0, 4, 4, 1, 2], 3
    weights, dense = quantized(experts, rows, columns, mode, dtype)
    x = random(tokens, columns, dtype=dtype)
    lhs = [k // 2 for k in range(len(chosen))]  # two experts a token
    y = empty((len(chosen), rows), dtype)
    made = quantized_kernel(name, mode, dtype)
    at = len(weights) if mode != "mxfp4" else 3
    packed = weights[0].data.nbytes // 4 // experts
    per_scale = 32 if mode == "mxfp4" else 64
    buffers = list(
        (
            buffer(x),
            Buffer.of(np.array(lhs, np.uint32)),
            Buffer.of(np.array(chosen, np.uint32)),
            y,
            ints(columns),
            ints(rows),
            ints(1),
            ints(tokens, 1, columns),
            ints(columns, columns, 1, dtype="int64"),
            ints(1),
            ints(experts, rows, packed // rows),
            ints(packed, packed // rows, 1, dtype="int64"),
        )
    )
    strides = ints(rows * columns // per_scale, columns // per_scale, 1, dtype="int64")
    buffers += [strides] * (1 if mode == "mxfp4" else 2)
    one = Buffer.of(np.array([1], np.int64))
    buffers += [ints(1), Buffer.of(np.array([len(chosen)], np.int32)), one, one]
    bound = dict(enumerate(weights)) | {at + i: b for i, b in enumerate(buffers)}
    launch(made, bound, (1, rows // 8, len(chosen)), (32, 2, 1))
    wide = x.astype(mx.float32)
    wanted = mx.stack([dense[e] @ wide[t] for t, e in zip(lhs, chosen, strict=True)])
    assert_close(y, wanted, dtype)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("mxfp4", mx.float32), ("mxfp4", mx.float16), ("affine4", mx.float32)],
)
def test_quantised_matmul_with_simdgroup_matrices(mode: str, dtype: mx.Dtype) -> None:
    rows, columns, tokens = 64, 128, 37
    weights, dense = quantized(1, rows, columns, mode, dtype)
    x = random(tokens, columns, dtype=dtype)
    y = empty((tokens, rows), dtype)
    made = quantized_kernel("qmm_t", mode, dtype, ", true, false")
    at = len(weights) if mode != "mxfp4" else 3
    bound = dict(enumerate(weights)) | {
        at: buffer(x),
        at + 1: y,
        at + 2: ints(columns),
        at + 3: ints(rows),
        at + 4: ints(tokens),
    }
    report = launch(made, bound, (rows // 32, -(-tokens // 32), 1), (32, 2, 2))
    assert_close(y, x.astype(mx.float32) @ dense[0].T, dtype)
    assert report.totals().matrix_operations > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "keys"), [(mx.float32, 77), (mx.bfloat16, 131)])
def test_attention_of_one_token_with_sinks(dtype: mx.Dtype, keys: int, order: str) -> None:
    heads, kv_heads, width = 16, 2, 64
    q, k, v, sinks = _attention(heads, kv_heads, keys, width, dtype)
    out = empty((heads, width), dtype)
    constants = ATTENTION_CONSTANTS
    made = kernel(f"sdpa_vector<{TYPE[dtype]}, 64, 64>", "sdpa_vector.h", **constants)
    buffers = {
        0: buffer(q),
        1: buffer(k),
        2: buffer(v),
        3: out,
        4: ints(heads // kv_heads),
        5: ints(keys),
    }
    buffers |= _strides(6, keys, width) | {10: Buffer.of(np.float32(0.125))}
    buffers |= {16: buffer(sinks), 17: ints(heads)}
    launch(made, buffers, (heads, 1, 1), (1024, 1, 1), order=order)
    assert_close(out, _attention_by_mlx(q, k, v, sinks), dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_attention_in_two_passes_with_sinks(dtype: mx.Dtype) -> None:
    heads, kv_heads, width, keys, blocks = 16, 2, 64, 1500, 32
    q, k, v, sinks = _attention(heads, kv_heads, keys, width, dtype)
    partials = empty((heads, blocks, width), dtype)
    sums, maxs = (empty((heads, blocks), mx.float32) for _ in range(2))
    constants = ATTENTION_CONSTANTS | {"blocks": blocks}
    first = kernel(f"sdpa_vector_2pass_1<{TYPE[dtype]}, 64, 64>", "sdpa_vector.h", **constants)
    buffers = {
        0: buffer(q),
        1: buffer(k),
        2: buffer(v),
        3: partials,
        4: sums,
        5: maxs,
        7: ints(keys),
    }
    buffers |= _strides(8, keys, width) | {12: Buffer.of(np.float32(0.125)), 18: buffer(sinks)}
    threads = (32, heads // kv_heads, 1)
    launch(first, buffers, (kv_heads, 1, blocks), threads)
    out = empty((heads, width), dtype)
    second = kernel(f"sdpa_vector_2pass_2<{TYPE[dtype]}, 64>", "sdpa_vector.h", **constants)
    buffers = {0: partials, 1: sums, 2: maxs, 3: out, 4: ints(blocks)}
    launch(second, buffers, (heads, 1, 1), (1024, 1, 1))
    assert_close(out, _attention_by_mlx(q, k, v, sinks), dtype)


def _attention(heads: int, kv_heads: int, keys: int, width: int, dtype: mx.Dtype):
    q = random(1, heads, 1, width, dtype=dtype)
    k, v = (random(1, kv_heads, keys, width, dtype=dtype, seed=s) for s in (1, 2))
    return q, k, v, random(heads, dtype=dtype, seed=3) * 2


def _strides(at: int, keys: int, width: int) -> dict[int, Buffer]:
    values = (keys * width, width, keys * width, width)
    return {at + i: ints(v, dtype="uint64") for i, v in enumerate(values)}


def _attention_by_mlx(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> mx.array:
    q, k, v, sinks = (a.astype(mx.float32) for a in (q, k, v, sinks))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, sinks=sinks)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "width"), [("single_row", 1000), ("looped", 5000)])
def test_softmax(name: str, width: int, dtype: mx.Dtype, order: str) -> None:
    """The looped form goes twice over a row, and is for threadgroups of 1024."""
    threads = 1024 if name == "looped" else 256
    x = random(3, width, dtype=dtype) * 3
    y = empty((3, width), dtype)
    made = kernel(f"softmax_{name}<{TYPE[dtype]}, float>", "softmax.h")
    launch(made, {0: buffer(x), 1: y, 2: ints(width)}, (3, 1, 1), (threads, 1, 1), order=order)
    assert_close(y, mx.softmax(x.astype(mx.float64), axis=-1), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "width"), [("logsumexp", 1000), ("logsumexp_looped", 5000)])
def test_logsumexp(name: str, width: int, dtype: mx.Dtype) -> None:
    threads = 1024 if name == "logsumexp_looped" else 256
    x = random(3, width, dtype=dtype) * 3
    y = empty((3,), dtype)
    made = kernel(f"{name}<{TYPE[dtype]}>", "logsumexp.h")
    launch(made, {0: buffer(x), 1: y, 2: ints(width)}, (3, 1, 1), (threads, 1, 1))
    assert_close(y, mx.logsumexp(x.astype(mx.float64), axis=-1), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_with_simdgroup_matrices(dtype: mx.Dtype) -> None:
    """steel_gemm_fused, B transposed, a tile at the edge in M."""
    m, n, k = 41, 64, 96
    a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    out = empty((m, n), dtype)
    made = kernel(
        f"gemm<{TYPE[dtype]}, 32, 32, 16, 2, 2, false, true>",
        "steel/gemm/gemm.h",
        "steel/gemm/kernels/steel_gemm_fused.h",
        has_batch=False,
        use_out_source=False,
        do_axpby=False,
        align_M=False,
        align_N=True,
        align_K=True,
    )
    tiles = (n // 32, -(-m // 32))
    params = np.array([m, n, k, k, k, n, *tiles], np.int32).tobytes()
    params += np.array([m * k, n * k, m * n], np.int64).tobytes()
    params += np.array([0, k // 16, 1, 0], np.int32).tobytes()
    buffers = {
        0: buffer(a),
        1: buffer(b),
        3: out,
        4: Buffer.of(np.frombuffer(params, np.uint8), dtype=""),
    }
    report = launch(made, buffers, (*tiles, 1), (32, 2, 2))
    assert_close(out, a.astype(mx.float32) @ b.astype(mx.float32).T, dtype)
    assert report.totals().matrix_operations > 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemv(dtype: mx.Dtype) -> None:
    """The last threadgroup moves up to end at the last row, and writes some rows a second time."""
    rows, columns = 83, 200
    matrix, vector = random(rows, columns, dtype=dtype), random(columns, dtype=dtype, seed=1)
    out = empty((rows,), dtype)
    made = kernel(f"gemv<{TYPE[dtype]}, 4, 1, 1, 32, 4, 4, false, false>", "gemv.h")
    buffers = {
        0: buffer(matrix),
        1: buffer(vector),
        3: out,
        4: ints(columns),
        5: ints(rows),
        6: ints(columns),
    }
    zero = Buffer.of(np.array([0], np.int64))
    buffers |= {9: ints(1), 10: Buffer.of(np.array([1], np.int32)), 11: zero, 12: zero}
    launch(made, buffers, (-(-rows // 16), 1, 1), (32, 1, 4), allow=["device-race"])
    assert_close(out, matrix.astype(mx.float32) @ vector.astype(mx.float32), dtype)
