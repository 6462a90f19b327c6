"""Packed weights as exact float64 numbers, by arithmetic that shares nothing with MLX.

`verify` holds the device's matrix products to these. numpy alone does the work, row by row of what
is asked for, so nothing large is ever made.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.matrix import Matrix

Float64 = npt.NDArray[np.float64]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E8M0_BIAS = 127


def bits_of(array: mx.array) -> np.ndarray:
    """An array's bits in numpy, which has no bfloat16: that comes as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def numbers(array: mx.array) -> Float64:
    """A float array as float64, exactly."""
    bits = bits_of(array)
    if array.dtype == mx.bfloat16:
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


def dense_rows(matrix: Matrix, rows: npt.NDArray[np.int64], expert: int | None = None) -> Float64:
    """Rows of a matrix, (len(rows), columns) float64.

    Args:
        matrix: dense, MXFP4, or affine with 4 or 8 bits.
        rows: which ones.
        expert: of a stack of matrices; None where there is one.
    """

    def take(array: mx.array) -> mx.array:
        return (array if expert is None else array[expert])[mx.array(rows)]

    if matrix.mode is None:
        return numbers(take(matrix.weight))
    assert matrix.scales is not None and matrix.bits is not None
    words, scales = bits_of(take(matrix.weight)), take(matrix.scales)
    codes = words.view(np.uint8)  # little-endian: the first value is in the lowest bits
    if matrix.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(rows), -1)
    groups = codes.reshape(len(rows), -1, matrix.group_size or 1)
    if matrix.mode == "mxfp4":
        powers = np.exp2(bits_of(scales).astype(np.float64) - E8M0_BIAS)
        return (E2M1[groups] * powers[..., None]).reshape(len(rows), -1)
    assert matrix.offsets is not None
    scale, offset = numbers(scales), numbers(take(matrix.offsets))
    return (groups * scale[..., None] + offset[..., None]).reshape(len(rows), -1)


def bias_rows(matrix: Matrix, rows: npt.NDArray[np.int64], expert: int | None = None) -> Float64:
    """The bias of those rows, zeros where there is none."""
    if matrix.bias is None:
        return np.zeros(len(rows))
    return numbers(matrix.bias if expert is None else matrix.bias[expert])[rows]
