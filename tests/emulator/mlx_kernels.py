"""MLX's own Metal kernels, from the headers that the installed wheel ships.

The host side is ours: `launch_*` calls a kernel as mlx/backend/metal does (quantized.cpp,
scaled_dot_product_attention.cpp, softmax.cpp, logsumexp.cpp, matmul.cpp of MLX 0.32).
Three things of MLX's source are replaced, all because address spaces are erased here: complex
numbers, whose constructors are overloaded on the space of `this`; logging; and `pointer_element`,
specialised once for each space.
"""

import functools
import re
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.metal.emulator import Buffer, Kernel, Report, read_metal

INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = INCLUDE / "mlx" / "backend" / "metal" / "kernels"
REPLACED = ("bf16_math.h", "complex.h", "logging.h")
COMPLEX = """
template <class T> struct complex_t {
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i = 0) : real(r), imag(i) {}
  complex_t operator+(complex_t o) const { return {real + o.real, imag + o.imag}; }
  complex_t operator*(complex_t o) const {
    return {real * o.real - imag * o.imag, real * o.imag + imag * o.real};
  }
};
typedef complex_t<float> complex64_t;
"""
ATTENTION_CONSTANTS = {"has_mask": False, "query_transposed": False, "do_causal": False,
                       "bool_mask": False, "float_mask": False, "has_sinks": True}  # fmt: skip
TYPE = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}


@functools.cache
def source(*headers: str) -> str:
    """The text of headers of MLX, each included file once."""
    paths = [KERNELS / header for header in ("utils.h", *headers)]
    text = COMPLEX + read_metal(*paths, roots=[INCLUDE], skip=REPLACED)
    pointer_element = (
        r"template <typename T>\s*struct pointer_element<(?!thread )\w+ T\*> \{[^}]*\};"
    )
    return re.sub(pointer_element, "", text)


def kernel(instance: str, *headers: str, **constants: bool | int) -> Kernel:
    """A kernel of MLX, instrumented, with its function constants."""
    return Kernel(source(*headers), instance, constants=constants)


def buffer(array: mx.array) -> Buffer:
    """The contents of an MLX array."""
    if array.dtype == mx.bfloat16:
        return Buffer.of(np.array(array.view(mx.uint16)), dtype="bfloat16")
    return Buffer.of(np.array(array))


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> Buffer:
    return Buffer.empty(shape, str(dtype).removeprefix("mlx.core."))


def ints(*values: int, dtype: str = "int32") -> Buffer:
    """Values in the constant address space; one value is a reference's."""
    return Buffer.of(np.array(values if len(values) > 1 else values[0], dtype))


def launch(
    made: Kernel,
    buffers: dict[int, Buffer],
    groups: tuple[int, int, int],
    threads: tuple[int, int, int],
    **options,
) -> Report:
    """Dispatch threadgroups, as MLX's `dispatch_threadgroups`."""
    assert prod(threads) <= 1024
    x, y, z = (g * t for g, t in zip(groups, threads, strict=True))
    return made(buffers, grid=(x, y, z), threadgroup=threads, **options)
