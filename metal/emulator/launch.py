"""Compiles a kernel and runs it over a grid."""

import ctypes
import functools
import re
import time
from collections.abc import Iterable, Mapping
from math import prod
from typing import Literal

import numpy as np

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import runtime
from mlx_gptoss.metal.emulator.buffer import Buffer
from mlx_gptoss.metal.emulator.build import Mode, build_kernel
from mlx_gptoss.metal.emulator.collect import collect
from mlx_gptoss.metal.emulator.report import ALLOWABLE, CHECKS, Finding, Report
from mlx_gptoss.metal.emulator.signature import Parameter, entry_point, parameters_of
from mlx_gptoss.metal.emulator.source import (
    arena_variable,
    prepare,
    rewrite_threadgroup_variables,
    specialise,
)

Order = Literal["forward", "reverse"]
Size = tuple[int, int, int]
Buffers = Mapping[str, Buffer] | Mapping[int, Buffer] | Mapping[str | int, Buffer]
MAX_THREADS = 1024


class KernelFault(EmulatorError):
    """A kernel did what Metal does not allow; `report.findings` has the details."""

    def __init__(self, report: Report) -> None:
        super().__init__("\n".join(str(f) for f in report.findings))
        self.report = report


class Kernel:
    """A kernel function compiled for the CPU.

    Attributes:
        name: Of the function, or of the instance.
        parameters: Of the function, in order.
    """

    def __init__(
        self,
        source: str,
        function: str,
        *,
        mode: Mode = Mode.INSTRUMENTED,
        constants: Mapping[str, bool | int | float] | None = None,
    ) -> None:
        """Compile a kernel.

        Args:
            source: Metal source, see `read_metal`.
            function: Name of the function; the host name of an explicit instantiation; or an
                instance of a template such as `"rms<float, 4>"`.
            mode: Instrumented or plain.
            constants: Values of the function constants that it uses, by name.

        Raises:
            CompileError: The source does not compile.
            EmulatorError: There is no such function or function constant, or no compiler.
        """
        prepared = prepare(source)
        instance = prepared.instances.get(function, function)
        self.name, self.mode = function, Mode(mode)
        self.parameters = parameters_of(prepared, instance.split("<")[0].strip())
        text = specialise(prepared, constants or {})
        text = rewrite_threadgroup_variables(text, arena_variable)
        program = text + entry_point(self.parameters, instance)
        self.library = build_kernel(program, name=self.name, mode=self.mode)
        runtime.library()
        try:
            self._code = ctypes.CDLL(str(self.library))
        except OSError as error:
            missing = re.search(r"undefined symbol: (\w+)", str(error))
            if missing is None or missing[1] not in prepared.function_constants:
                raise EmulatorError(f"kernel '{function}' cannot be loaded: {error}") from error
            raise EmulatorError(
                f"kernel '{function}' uses the function constant '{missing[1]}', which has no "
                f"value: give `constants` one, on the command line --constant {missing[1]}=VALUE"
            ) from error
        described = (runtime.Parameter * len(self.parameters)).in_dll(self._code, "emu_parameters")
        self._types = list(described)

    @property
    def buffers(self) -> list[Parameter]:
        """The buffer parameters in the order of their index."""
        return sorted((p for p in self.parameters if p.kind == "buffer"), key=lambda p: p.index)

    @property
    def types(self) -> dict[str, runtime.Parameter]:
        """What the compiler says of each buffer parameter: dtype, size, constness."""
        pairs = zip(self.parameters, self._types, strict=True)
        return {p.name: kind for p, kind in pairs if p.kind == "buffer"}

    def __call__(
        self,
        buffers: Buffers,
        *,
        grid: Size,
        threadgroup: Size,
        order: Order = "forward",
        threadgroups: int | None = None,
        threadgroup_bytes: Mapping[int, int] | None = None,
        allow: Iterable[str] = (),
    ) -> Report:
        """Run the kernel; its stores go back into the buffers.

        Args:
            buffers: By parameter name or buffer index. A buffer may be left out if it is not used.
            grid: Threads in each dimension.
            threadgroup: Threads of a threadgroup in each dimension.
            order: In which threads, simdgroups and threadgroups take their turns.
            threadgroups: Run only so many, evenly spread over the grid; None runs all.
            threadgroup_bytes: Sizes of the `[[threadgroup(n)]]` arguments by n.
            allow: Checks that do not count, names of `ALLOWABLE`.

        Raises:
            KernelFault: The kernel did what Metal does not allow.
            EmulatorError: A buffer is missing or does not fit its parameter.
            ValueError: An argument makes no sense.
        """
        if min(*grid, *threadgroup) < 1:
            raise ValueError(f"grid {grid}, threadgroup {threadgroup}: sizes start at 1")
        bound, threadgroup_bytes = self._bind(buffers), dict(threadgroup_bytes or {})
        self._check_threadgroup_bytes(threadgroup_bytes)
        total = prod(-(-g // t) for g, t in zip(grid, threadgroup, strict=True))
        report = Report(self.name, self.mode.value, order, grid, threadgroup, total)
        if prod(threadgroup) > MAX_THREADS:
            text = f"{threadgroup} is {prod(threadgroup)} threads, at most {MAX_THREADS}"
            report.findings.append(Finding("too-many-threads", self.name, "?", 0, None, text))
            raise KernelFault(report)
        allowed = _check_numbers(allow)
        selected = _select(total, threadgroups, order)
        with runtime.lock:
            try:
                self._run(report, bound, selected, threadgroup_bytes, allowed)
            finally:
                runtime.free_all()
        if report.findings:
            raise KernelFault(report)
        return report

    def _bind(self, buffers: Buffers) -> dict[int, tuple[Parameter, Buffer, bool]]:
        """Match buffers with parameters: index -> (parameter, buffer, writable)."""
        by_key: dict[str | int, int] = {}
        for i, p in enumerate(self.parameters):
            if p.kind == "buffer":
                by_key |= {p.name: i, p.index: i}
        bound = {}
        for key, buffer in buffers.items():
            if key not in by_key:
                names = ", ".join(f"{p.name} ({p.index})" for p in self.buffers)
                raise EmulatorError(f"kernel '{self.name}' has no buffer {key!r}; it has {names}")
            parameter, kind = self.parameters[by_key[key]], self._types[by_key[key]]
            self._check_type(parameter, kind, buffer)
            writable = not (kind.read_only or parameter.constant or buffer.read_only)
            bound[parameter.index] = (parameter, buffer, writable)
        return bound

    def _check_threadgroup_bytes(self, sizes: Mapping[int, int]) -> None:
        names = {p.index: p.name for p in self.parameters if p.kind == "threadgroup"}
        for index in sorted(names.keys() ^ sizes.keys()):
            if index not in names:
                known = ", ".join(f"{n} ({i})" for i, n in names.items()) or "none"
                raise EmulatorError(
                    f"kernel '{self.name}' has no threadgroup argument {index}; it has {known}"
                )
            raise EmulatorError(
                f"kernel '{self.name}': threadgroup argument '{names[index]}' ({index}) has no "
                f"size: give `threadgroup_bytes`, on the command line "
                f"--threadgroup-bytes {index}=BYTES"
            )

    def _check_type(self, parameter: Parameter, kind: runtime.Parameter, buffer: Buffer) -> None:
        where = f"kernel '{self.name}': buffer '{parameter.name}' ({parameter.index})"
        wanted = kind.dtype.decode()
        if wanted and buffer.dtype and wanted != buffer.dtype:
            raise EmulatorError(
                f"{where}: expected {wanted}, got {buffer.dtype} of shape {buffer.shape}"
            )
        size = buffer.data.nbytes
        if kind.reference and size != kind.size:
            raise EmulatorError(
                f"{where}: expected one value of {kind.size} bytes, got {size} bytes"
            )
        if not wanted and size % kind.size:
            raise EmulatorError(f"{where}: expected a multiple of {kind.size} bytes, got {size}")

    def _run(
        self,
        report: Report,
        bound: dict[int, tuple[Parameter, Buffer, bool]],
        selected: np.ndarray,
        threadgroup_bytes: Mapping[int, int],
        allowed: int,
    ) -> None:
        table = (ctypes.c_void_p * (max((p.index for p in self.buffers), default=0) + 1))()
        records = (runtime.BufferRecord * max(1, len(bound)))()
        views = []
        for number, (index, (parameter, buffer, writable)) in enumerate(bound.items()):
            records[number], view = _place(parameter.name, buffer, writable=writable)
            table[index] = records[number].base
            views.append((view, buffer, writable))
        sizes = [threadgroup_bytes.get(i, 0) for i in range(max(threadgroup_bytes, default=-1) + 1)]
        instrumented = self.mode is Mode.INSTRUMENTED
        reverse = report.order == "reverse"
        launch = runtime.LaunchRecord(
            entry=ctypes.cast(self._code.emu_entry, ctypes.c_void_p),
            grid=report.grid,
            threadgroup=report.threadgroup,
            table=table,
            buffers=records,
            threadgroup_buffer_sizes=(ctypes.c_uint64 * len(sizes))(*sizes),
            threadgroups=selected.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64)),
            threadgroup_count=len(selected),
            buffer_count=len(bound),
            threadgroup_buffer_count=len(sizes),
            options=runtime.INSTRUMENTED * instrumented | runtime.REVERSE * reverse,
            allowed=allowed,
        )
        started = time.perf_counter()
        result = runtime.library().emu_run(ctypes.byref(launch)).contents
        report.seconds = time.perf_counter() - started
        collect(report, result, list(records[: len(bound)]), library=self.library, allowed=allowed)
        for view, buffer, writable in views:
            if writable:
                buffer.data[:] = view


def _place(name: str, buffer: Buffer, *, writable: bool) -> tuple[runtime.BufferRecord, np.ndarray]:
    """Copy a buffer to the guarded heap; returns its record and its bytes there."""
    size = buffer.data.nbytes
    address = runtime.allocate(size)
    flags = runtime.WRITABLE * writable | runtime.INITIALISED * buffer.initialised
    view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    view[:] = buffer.data
    return runtime.BufferRecord(base=address, size=size, name=name.encode(), flags=flags), view


def _select(total: int, count: int | None, order: Order) -> np.ndarray:
    """The threadgroups to run, in their order."""
    if order not in ("forward", "reverse"):
        raise ValueError(f"order {order!r}: expected 'forward' or 'reverse'")
    if count is not None and count < 1:
        raise ValueError(f"threadgroups={count}: expected at least 1, or None for all")
    chosen = np.arange(total, dtype=np.uint64)
    if count is not None and count < total:
        chosen = np.arange(count, dtype=np.uint64) * np.uint64(total) // np.uint64(count)
    return np.ascontiguousarray(chosen[::-1] if order == "reverse" else chosen)


def _check_numbers(names: Iterable[str]) -> int:
    bits = 0
    for name in names:
        if name not in ALLOWABLE:
            known = ", ".join(c for c in CHECKS if c in ALLOWABLE)
            raise ValueError(f"check {name!r} cannot be allowed; these can: {known}")
        bits |= 1 << CHECKS.index(name)
    return bits


@functools.lru_cache(maxsize=256)
def compiled(source: str, function: str, mode: Mode) -> Kernel:
    """A kernel from the process's cache."""
    return Kernel(source, function, mode=mode)
