"""From a `.metal` file to a kernel that MLX launches, and the checks in front of it.

A file of `metal/` holds an ordinary templated function. It becomes the `header` of an
`mx.fast.metal_kernel` whose body is one call, with every size written into the call: MLX wraps the
body in a kernel function, names the parameters after our inputs and outputs, and adds those grid
attributes whose names occur in the body.

Kernels are built when first called, never at import. The cache is keyed by the factory too, so a
kernel made while the emulator stands in for Metal is not mistaken for a real one.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_gptoss import metal
from mlx_gptoss.errors import KernelError

HEAD_DIM = 64  # of both published models; the kernels' lane maps are written for it
FLOATS = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
PLACE = {
    "tile": "threadgroup_position_in_grid",
    "thread_id": "thread_index_in_threadgroup",
    "lane": "thread_index_in_simdgroup",
    "group": "simdgroup_index_in_threadgroup",
}

Factory = Callable[..., Callable[..., list[mx.array]]]


@functools.cache
def source_text(name: str) -> str:
    """The text of a kernel with its includes in place and without comments.

    MLX hashes the text on every dispatch, so it is kept short; lines keep their numbers, for error
    messages.
    """
    seen: set[str] = set()

    def inline(file: str) -> list[str]:
        if file in seen:
            return [""]
        seen.add(file)
        lines = [f'#line 1 "{file}"']
        for number, line in enumerate(metal.source(file).splitlines(), 1):
            code = line.split("//")[0].rstrip()
            include = re.fullmatch(r'#include "(.+)"', code)
            if include:
                lines += [*inline(include[1]), f'#line {number + 1} "{file}"']
            else:
                lines.append("" if code == "#pragma once" else code)
        return lines

    return "\n".join(inline(f"{name}.metal"))


@functools.lru_cache(maxsize=256)
def _build(
    factory: Factory, stem: str, inputs: tuple[str, ...], outputs: tuple[str, ...], body: str
) -> Callable[..., list[mx.array]]:
    return factory(
        name=f"gptoss_{stem}",
        input_names=list(inputs),
        output_names=list(outputs),
        header=source_text(stem),
        source=body,
    )


def launch(
    stem: str,
    inputs: Mapping[str, mx.array],
    outputs: Mapping[str, tuple[Sequence[int], mx.Dtype]],
    *,
    body: str,
    groups: tuple[int, int, int],
    threads: int,
) -> list[mx.array]:
    """Run one kernel.

    Args:
        stem: file name without `.metal`.
        inputs: arrays under the names that `body` uses.
        outputs: shape and dtype of each result, likewise.
        body: Metal statements; `$tile`, `$thread_id`, `$lane`, `$group` are the grid attributes.
        groups: threadgroups in x, y, z.
        threads: in a threadgroup.

    Returns:
        The outputs, in order.
    """
    for name, attribute in PLACE.items():
        body = re.sub(rf"\${name}\b", attribute, body)
    kernel = _build(mx.fast.metal_kernel, stem, tuple(inputs), tuple(outputs), body)
    return kernel(
        inputs=list(inputs.values()),
        grid=(groups[0] * threads, groups[1], groups[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=[tuple(shape) for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        stream=mx.gpu,
    )


def number(value: float) -> str:
    """A float32 literal of Metal."""
    return f"{float(value)!r}f"


def require(stem: str, condition: Any, name: str, expected: str, got: Any) -> None:
    """Raise KernelError unless `condition` holds."""
    if not condition:
        raise KernelError(
            f"{stem}: {name}: expected {expected}, got {got}; "
            'load the model with kernels="off" to run it without this kernel'
        )


def expect(stem: str, name: str, array: mx.array, shape: Sequence[int], *dtypes: mx.Dtype) -> None:
    """Raise KernelError unless an array has the shape and one of the dtypes."""
    names = " or ".join(str(dtype).removeprefix("mlx.core.") for dtype in dtypes)
    got = f"{array.shape} {str(array.dtype).removeprefix('mlx.core.')}"
    good = array.shape == tuple(shape) and array.dtype in dtypes
    require(stem, good, name, f"{tuple(shape)} {names}", got)
