"""Whether a kernel agrees with its definition, and by how much it may not.

Both get the same inputs; the definition gets them widened to float32, so that a narrow kernel is
held to the rounding of its own result and to nothing else. The definition runs on the CPU: an M5's
GPU cuts the factors of float32 products of two rows or more to 11 bits (MLX's TF32).
"""

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.kernels.inputs import Arguments, Dense, Inputs, Sizes
from mlx_gptoss.kernels.registry import Kernel
from mlx_gptoss.matrix import Matrix

RELATIVE = {mx.float32: 2e-6, mx.float16: 1e-3}  # of the largest value of an output
BFLOAT16_ULPS = 2  # of the value itself, and 2e-6 of the largest
# Tolerances within which a kernel is used. MLX adds 2880 products in one float32, so at the models'
# widths the definition of `unembed` is itself off by nearly two; a wrong kernel is by far more.
MOST_EXCESS = 4


def widened(value: Any) -> Any:
    """The same arguments with 16-bit floats as float32, and 0 where a cache row is undefined."""
    if isinstance(value, dict):
        return {name: widened(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(widened(item) for item in value)
    if isinstance(value, Matrix):
        fields = {f.name: widened(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return Matrix(**fields)
    if isinstance(value, mx.Dtype):
        return mx.float32
    if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
        value = value.astype(mx.float32)
        return mx.where(mx.isnan(value), 0, value)
    return value


def flattened(outputs: Any) -> list[mx.array]:
    """The arrays of a result, in order."""
    if isinstance(outputs, mx.array):
        return [outputs]
    return [array for item in outputs for array in flattened(item)]


def excess(got: mx.array, want: mx.array) -> float:
    """How far two outputs differ, as a multiple of the tolerance of the first one's type.

    Args:
        got: of a kernel.
        want: of its definition on float32 inputs, the same shape.

    Returns:
        The largest difference over its tolerance, <= 1 if they agree; infinite if one has numbers
        where the other has none.
    """
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (got, want))
    special = ~np.isfinite(a) | ~np.isfinite(b)
    if a.shape != b.shape or not np.array_equal(a[special], b[special]):
        return float("inf")
    a, b = np.where(special, 0, a), np.where(special, 0, b)
    largest = float(np.abs(b).max(initial=0))
    if got.dtype == mx.bfloat16:
        exponent = np.floor(np.log2(np.maximum(np.abs(b), 1e-30)))
        tolerance = BFLOAT16_ULPS * 2.0 ** (exponent - 7) + RELATIVE[mx.float32] * largest
    else:
        tolerance = RELATIVE.get(got.dtype, 0) * largest
    difference = np.abs(a - b)
    wrong = difference > 0
    if not wrong.any():
        return 0.0
    with np.errstate(divide="ignore"):
        return float((difference[wrong] / np.broadcast_to(tolerance, b.shape)[wrong]).max())


def compare(kernel: Kernel, arguments: Arguments) -> list[float]:
    """Run a kernel and its definition on the same arguments; return `excess` of each output."""
    got = kernel.observe(flattened(kernel.launch(**arguments)), arguments)
    with mx.stream(mx.cpu):
        part = kernel.excerpt(arguments)
        want = kernel.observe(flattened(kernel.define(**widened(part))), part)
        mx.eval(want)
    return [excess(a, b) for a, b in zip(got, want, strict=True)]


def agrees(kernel: Kernel, sizes: Sizes, *, dtype: mx.Dtype, dense: Dense) -> list[float]:
    """Compare a kernel with its definition on random inputs of some sizes."""
    return compare(kernel, kernel.case(Inputs(sizes, dtype=dtype, dense=dense)))
