"""Products with one matrix, dense or packed: the form of every weight of the model.

MLX packs experts as MXFP4 and, where a checkpoint was made so, other weights as 8 or 4-bit affine
groups. Nothing here knows which weight it multiplies by.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import ParamSpec

import mlx.core as mx

FLIP_FROM = 8  # rows of x, float32 on the CPU
HALVE_FROM = 2**20  # elements of a weight on the CPU: a millisecond of work


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight (rows, columns), or one per expert (E, rows, columns), with its bias (..., rows).

    Dense where `mode` is None; else packed by MLX as `mode` "mxfp4" or "affine" says, with scales,
    and for "affine" with `offsets` (which MLX calls biases).
    """

    weight: mx.array
    bias: mx.array | None = None
    scales: mx.array | None = None
    offsets: mx.array | None = None
    group_size: int | None = None
    bits: int | None = None
    mode: str | None = None


def in_float32(matrix: Matrix) -> Matrix:
    """A dense matrix, widened."""
    bias = None if matrix.bias is None else matrix.bias.astype(mx.float32)
    return Matrix(weight=matrix.weight.astype(mx.float32), bias=bias)


def unbiased(matrix: Matrix) -> Matrix:
    """A matrix without its bias, which a kernel will add."""
    return replace(matrix, bias=None)


def on_cpu() -> bool:
    """Whether MLX runs on the CPU: a few products take another form there."""
    return mx.default_device().type == mx.DeviceType.cpu


P = ParamSpec("P")


def fused(function: Callable[P, mx.array]) -> Callable[P, mx.array]:
    """A function whose elementwise steps Metal runs as one kernel.

    As it stands on the CPU, where MLX would call a C++ compiler.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> mx.array:
        return function(*args, **kwargs) if on_cpu() else compiled(*args, **kwargs)

    return call


def matmul_type(x: mx.array, matrix: Matrix) -> mx.Dtype:
    """The type in which activations enter a matrix product.

    MLX's CPU multiplies packed weights by bfloat16 without SIMD and sums in bfloat16; by float32
    it is 14 to 18 times faster and exact. Metal sums bfloat16 products in float32: it keeps them.
    """
    return mx.float32 if on_cpu() and matrix.mode is not None else x.dtype


def linear(x: mx.array, matrix: Matrix) -> mx.array:
    """Multiply: x W^T + bias, summed in float32.

    Args:
        x: (..., columns).
        matrix: one matrix, not experts.

    Returns:
        (..., rows) in the type that `matmul_type` says, or wider.
    """
    x = x.astype(matmul_type(x, matrix))
    if matrix.mode is None:
        return _dense_linear(x, matrix)
    assert matrix.scales is not None
    y = mx.quantized_matmul(
        x,
        matrix.weight,
        matrix.scales,
        matrix.offsets,
        group_size=matrix.group_size,
        bits=matrix.bits,
        mode=matrix.mode,
    )
    return y if matrix.bias is None else y + matrix.bias


def unbiased_linear(x: mx.array, matrix: Matrix) -> mx.array:
    """`linear` without the bias, which a kernel will add, rounded to the type of x."""
    return linear(x, unbiased(matrix)).astype(x.dtype)


def _dense_linear(x: mx.array, matrix: Matrix) -> mx.array:
    weight, bias = matrix.weight, matrix.bias
    if not on_cpu():
        return _product(x, weight, bias)
    flips = x.dtype == mx.float32 and x.size // x.shape[-1] >= FLIP_FROM
    product = _flipped_product if flips else _product
    if weight.size < HALVE_FROM:
        return product(x, weight, bias)
    # MLX's CPU runs one operation on one core. Each row of the weight is a sum of its own, so
    # halves give the same bits.
    middle = weight.shape[0] // 2
    biases = (None, None) if bias is None else (bias[:middle], bias[middle:])
    first = product(x, weight[:middle], biases[0])
    with mx.stream(_second_stream()):
        second = product(x, weight[middle:], biases[1])
    return mx.concatenate([first, second], axis=-1)


def _product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _flipped_product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    # The BLAS of MLX's Linux wheel is not tuned: x W^T as dot products takes twice as long as
    # W x^T with x^T laid out by columns, which it runs along vectors. Same sums, same bits.
    columns = mx.contiguous(x.reshape(-1, x.shape[-1]).T)
    y = (weight @ columns).T.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


@cache
def _second_stream() -> mx.ThreadLocalStream:
    """A second queue of CPU work, one for each thread that uses it."""
    return mx.new_thread_local_stream(mx.cpu)


def expert_linear(x: mx.array, matrix: Matrix, experts: mx.array, *, grouped: bool) -> mx.array:
    """Multiply by chosen experts: x W[e]^T + bias[e] for one expert e per row.

    Args:
        x: (..., 1, columns).
        matrix: (E, rows, columns), with bias (E, rows) or without.
        experts: uint32, the shape that x broadcasts to without its last two axes.
        grouped: whether `experts` is sorted, so that a GEMM can serve neighbours together.

    Returns:
        (*experts.shape, 1, rows) in the type that `matmul_type` says.
    """
    x = x.astype(matmul_type(x, matrix))
    if matrix.mode is None:
        weight = matrix.weight.swapaxes(-1, -2)
        y = mx.gather_mm(x, weight, rhs_indices=experts, sorted_indices=grouped)
    else:
        assert matrix.scales is not None
        y = mx.gather_qmm(
            x,
            matrix.weight,
            matrix.scales,
            matrix.offsets,
            rhs_indices=experts,
            group_size=matrix.group_size,
            bits=matrix.bits,
            mode=matrix.mode,
            sorted_indices=grouped,
        )
    return y if matrix.bias is None else y + matrix.bias[experts][..., None, :]


def embed(tokens: mx.array, matrix: Matrix, dtype: mx.Dtype) -> mx.array:
    """Rows of the embedding: (B, T) -> (B, T, D) of `dtype`."""
    if matrix.mode is None:
        return matrix.weight[tokens].astype(dtype)
    assert matrix.scales is not None
    return mx.dequantize(
        matrix.weight[tokens],
        matrix.scales[tokens],
        None if matrix.offsets is None else matrix.offsets[tokens],
        group_size=matrix.group_size,
        bits=matrix.bits,
        mode=matrix.mode,
    ).astype(dtype)
