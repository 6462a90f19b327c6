"""A stand-in for `mx.fast.metal_kernel` that runs kernels on the emulator.

The Metal source is MLX's own: MLX writes a kernel's signature from its inputs' names, shapes and
dtypes when the kernel is called, and keeps the whole text in the function it exports
(`mx.export_function`), even where no Metal device exists. Read back from there, nothing of MLX's
signature writer is imitated.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator.buffer import Buffer
from mlx_gptoss.metal.emulator.build import Mode
from mlx_gptoss.metal.emulator.launch import KernelFault, Order, compiled
from mlx_gptoss.metal.emulator.report import Report

_metal_kernel = mx.fast.metal_kernel

# What MLX's utils.h offers to custom kernels and generated code uses (mlx/backend/metal/kernels/
# utils.h and bf16.h of MLX 0.32, MIT), without the complex numbers that come with the whole file.
PRELUDE = """#line 1 "mlx utils.h"
using namespace metal;
typedef bfloat bfloat16_t;
typedef half float16_t;
template <typename T, typename U> inline T ceildiv(T n, U m) { return (n + m - 1) / m; }
template <typename IdxT = int64_t>
METAL_FUNC IdxT elem_to_loc(
    IdxT elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  IdxT loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * IdxT(strides[i]);
    elem /= shape[i];
  }
  return loc;
}
"""


@dataclass
class Session:
    """How kernels run inside `emulate`, and what came of them.

    Attributes:
        mode: Instrumented or plain.
        order: In which threads, simdgroups and threadgroups take their turns.
        threadgroups: How many threadgroups of each launch run, evenly spread; None for all.
        allow: Checks that do not count.
        reports: One for each launch, in order.
        sources: Metal source of each kernel by its host name, for `check_strict` and `ptx.build`.
    """

    mode: Mode = Mode.INSTRUMENTED
    order: Order = "forward"
    threadgroups: int | None = None
    allow: tuple[str, ...] = ()
    reports: list[Report] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)


_sessions: list[Session] = []


@contextmanager
def emulate(
    *,
    mode: Mode | str = Mode.INSTRUMENTED,
    order: Order = "forward",
    threadgroups: int | None = None,
    allow: Iterable[str] = (),
) -> Iterator[Session]:
    """Replace `mx.fast.metal_kernel` by the emulator inside a `with` block.

    Kernels made inside run at once, at their call: they cannot be traced by `mx.compile`.

    Args:
        mode: `Mode` or its value, "instrumented" or "plain".
        order: "forward" or "reverse".
        threadgroups: Run only so many threadgroups of each launch; outputs are then incomplete.
            With 0 nothing is compiled: only `sources` are collected.
        allow: Checks that do not count, names of `ALLOWABLE`.

    Yields:
        The session, whose `reports` grow with each launch.
    """
    session = Session(Mode(mode), order, threadgroups, tuple(allow))
    _sessions.append(session)
    replaced, mx.fast.metal_kernel = mx.fast.metal_kernel, emulated_metal_kernel  # type: ignore[assignment]
    try:
        yield session
    finally:
        mx.fast.metal_kernel = replaced
        _sessions.remove(session)


def emulated_metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> "EmulatedKernel":
    """Make a kernel as `mx.fast.metal_kernel` does, with the same arguments."""
    made = _metal_kernel(
        name=name,
        input_names=input_names,
        output_names=output_names,
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
    )
    return EmulatedKernel(made, name, tuple(input_names), tuple(output_names), source, header)


@dataclass
class EmulatedKernel:
    """What `emulated_metal_kernel` returns: call it as the kernel of MLX."""

    made: Any
    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    _generated: dict[Any, tuple[str, str]] = field(default_factory=dict)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel in the innermost `emulate` session.

        Raises:
            EmulatorError: There is no session.
            KernelFault: A check failed.
        """
        if not _sessions:
            raise EmulatorError(
                f"kernel '{self.name}' was made inside `emulate`; call it inside too"
            )
        session = _sessions[-1]
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        shape_of = dict(zip(self.output_names, output_shapes, strict=True))
        dtype_of = dict(zip(self.output_names, output_dtypes, strict=True))
        options = {
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "template": template,
            "init_value": init_value,
        }
        function, text = self.generated(arrays, options)
        session.sources[function] = text
        if session.threadgroups == 0:
            return [mx.zeros(shape_of[n], dtype_of[n]) for n in self.output_names]
        kernel = compiled(text, function, session.mode)
        buffers = self._inputs(arrays, {p.name for p in kernel.buffers})
        outputs = {n: _output(shape_of[n], dtype_of[n], init_value) for n in self.output_names}
        x, y, z = (min(t, g) for t, g in zip(threadgroup, grid, strict=True))  # as MLX does
        try:
            report = kernel(
                buffers | outputs,
                grid=grid,
                threadgroup=(x, y, z),
                order=session.order,
                threadgroups=session.threadgroups,
                allow=session.allow,
            )
        except KernelFault as fault:
            session.reports.append(fault.report)
            raise
        session.reports.append(report)
        return [_to_mlx(outputs[n], dtype_of[n]) for n in self.output_names]

    def generated(self, arrays: list[mx.array], options: dict[str, Any]) -> tuple[str, str]:
        """The kernel's host name and MLX's Metal source for a call, with `#line` directives."""
        kinds = tuple((str(a.dtype), a.ndim, a.size < 8) for a in arrays)
        key = (kinds, str(options["template"]), str(options["output_dtypes"]))
        if key not in self._generated:
            function, text = _exported(self.made, arrays, options)
            self._generated[key] = function, PRELUDE + self._with_lines(text)
        return self._generated[key]

    def _with_lines(self, text: str) -> str:
        """Tell the compiler which part is the header, MLX's signature, and the source argument."""
        if not text.startswith(self.header) or self.source not in text:
            raise EmulatorError(f"kernel '{self.name}': MLX changed its header or source")
        rest = text[len(self.header) :]
        at = rest.rindex(self.source)
        return (
            f'#line 1 "{self.name} (header)"\n{self.header}\n#line 1 "{self.name} (signature)"\n'
            f'{rest[:at]}\n#line 1 "{self.name} (source)"\n{rest[at:]}'
        )

    def _inputs(self, arrays: list[mx.array], names: set[str]) -> dict[str | int, Buffer]:
        found: dict[str | int, Buffer] = {}
        for name, array in zip(self.input_names, arrays, strict=True):
            found[name] = _from_mlx(array)
            strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
            described = {
                f"{name}_shape": np.array(array.shape, np.int32),
                f"{name}_strides": np.array(strides, np.int64),
                f"{name}_ndim": np.array(array.ndim, np.int32),
            }
            found |= {n: Buffer.of(v) for n, v in described.items() if n in names}
        return {n: b for n, b in found.items() if n in names}


def _exported(made: Any, arrays: list[mx.array], options: dict[str, Any]) -> tuple[str, str]:
    """Host name and source of a custom kernel, out of the function that MLX exports.

    The file holds the primitive's name, then its strings, each after its length of 8 bytes.
    """
    handle, path = tempfile.mkstemp(suffix=".mlxfn")
    os.close(handle)
    try:
        mx.export_function(
            path, lambda *xs: made(inputs=list(xs), stream=mx.gpu, **options), *arrays
        )
        data = Path(path).read_bytes()
    finally:
        os.remove(path)
    at = data.index(b"CustomKernel") + len("CustomKernel")
    strings = []
    for _ in range(2):
        length = int.from_bytes(data[at : at + 8], "little")
        strings.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    if not strings[0].startswith("custom_kernel_"):
        raise EmulatorError("the exported function has another form than MLX 0.32 writes")
    return strings[0], strings[1]


def _dtype_name(dtype: mx.Dtype) -> str:
    name = str(dtype).removeprefix("mlx.core.")
    return "bool" if name == "bool_" else name


def _from_mlx(array: mx.array) -> Buffer:
    if array.dtype == mx.bfloat16:
        return Buffer.of(np.array(array.view(mx.uint16)), dtype="bfloat16")
    return Buffer.of(np.array(array))


def _output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Buffer:
    if init_value is None:
        return Buffer.empty(tuple(shape), _dtype_name(dtype))
    return _from_mlx(mx.full(tuple(shape), init_value, dtype=dtype))


def _to_mlx(buffer: Buffer, dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(buffer.data.view(np.uint16).reshape(buffer.shape)).view(mx.bfloat16)
    return mx.array(buffer.array())
