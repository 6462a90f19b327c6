"""Runs a kernel's PTX on an NVIDIA GPU through the driver library, without any other package.

The third view of a kernel, and the only one with real weak memory and real parallelism. Its times
are NVIDIA's; they say nothing about Apple's.
"""

import ctypes
import ctypes.util
import functools
import statistics
from collections.abc import Mapping

import numpy as np

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator.buffer import Buffer
from mlx_gptoss.metal.emulator.ptx import ENTRY, PtxKernel

_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # of CUdevice_attribute
_CLOCK_KHZ, _BUS_BITS = 36, 37  # memory clock and bus width: the nominal bandwidth


class _Driver:
    """The driver library, with a context on its first device."""

    def __init__(self) -> None:
        path = ctypes.util.find_library("cuda")
        if path is None:
            raise EmulatorError("no NVIDIA driver: libcuda was not found")
        self.library = ctypes.CDLL(path)
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.device = device

    def call(self, name: str, *arguments: object) -> None:
        """Call a driver function; a status other than 0 is an error."""
        status = getattr(self.library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode() if text.value else f"status {status}"
            raise EmulatorError(f"NVIDIA driver: {name}: {said}")

    def attribute(self, number: int) -> int:
        """A device attribute."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value


@functools.cache
def driver() -> _Driver:
    """The driver of this process.

    Raises:
        EmulatorError: There is no NVIDIA GPU or no driver.
    """
    return _Driver()


def architecture() -> str:
    """The GPU's architecture, such as "sm_90", for `ptx.build`."""
    found = driver()
    return f"sm_{found.attribute(_COMPUTE_MAJOR)}{found.attribute(_COMPUTE_MINOR)}"


def nominal_bandwidth() -> float:
    """Bytes per second that the memory's clock and bus width allow, double data rate."""
    found = driver()
    return found.attribute(_CLOCK_KHZ) * 1e3 * 2 * found.attribute(_BUS_BITS) / 8


def run(
    kernel: PtxKernel,
    buffers: Mapping[str, Buffer],
    *,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    repeats: int = 1,
) -> float:
    """Run a kernel on the GPU; what it stored goes back into the buffers.

    Args:
        kernel: From `ptx.build`.
        buffers: By parameter name.
        grid: Threads in each dimension, multiples of the threadgroup's.
        threadgroup: Threads of a threadgroup in each dimension.
        repeats: Timed runs; the outputs are those of the last.

    Returns:
        Median time of a run in seconds, by the GPU's clock.

    Raises:
        EmulatorError: There is no GPU, or the driver refuses.
        ValueError: The grid is not a multiple of the threadgroup.
    """
    if any(g % t for g, t in zip(grid, threadgroup, strict=True)):
        raise ValueError(f"grid {grid} is not a multiple of threadgroup {threadgroup}")
    found = driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    found.call("cuModuleLoadData", ctypes.byref(module), kernel.text.encode() + b"\0")
    try:
        found.call("cuModuleGetFunction", ctypes.byref(function), module, ENTRY.encode())
        return _run_loaded(found, function, kernel, buffers, grid, threadgroup, repeats)
    finally:
        found.call("cuModuleUnload", module)


def _run_loaded(
    found: _Driver,
    function: ctypes.c_void_p,
    kernel: PtxKernel,
    buffers: Mapping[str, Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    repeats: int,
) -> float:
    addresses: dict[str, ctypes.c_uint64] = {}
    try:
        for name, buffer in buffers.items():
            addresses[name] = address = ctypes.c_uint64()
            size = ctypes.c_size_t(max(1, buffer.data.nbytes))
            found.call("cuMemAlloc_v2", ctypes.byref(address), size)
            _copy(found, "cuMemcpyHtoD_v2", buffer.data, address)
        names = [p.name for p in kernel.parameters if p.kind == "buffer"]
        values = [addresses.get(name, ctypes.c_uint64(0)) for name in names]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        blocks = [g // t for g, t in zip(grid, threadgroup, strict=True)]
        shape = [ctypes.c_uint(n) for n in (*blocks, *threadgroup, 0)]
        times = [_timed(found, function, shape, pointers) for _ in range(repeats)]
        for name, buffer in buffers.items():
            _copy(found, "cuMemcpyDtoH_v2", buffer.data, addresses[name])
        return statistics.median(times)
    finally:
        for address in addresses.values():
            found.library.cuMemFree_v2(address)


def _copy(found: _Driver, function: str, data: np.ndarray, address: ctypes.c_uint64) -> None:
    host = data.ctypes.data_as(ctypes.c_void_p)
    ends = (address, host) if "HtoD" in function else (host, address)
    found.call(function, *ends, ctypes.c_size_t(data.nbytes))


def _timed(found: _Driver, function: ctypes.c_void_p, shape: list, pointers: ctypes.Array) -> float:
    events = [ctypes.c_void_p(), ctypes.c_void_p()]
    for event in events:
        found.call("cuEventCreate", ctypes.byref(event), 0)
    try:
        found.call("cuEventRecord", events[0], None)
        found.call("cuLaunchKernel", function, *shape, None, pointers, None)
        found.call("cuEventRecord", events[1], None)
        found.call("cuEventSynchronize", events[1])
        elapsed = ctypes.c_float()
        found.call("cuEventElapsedTime", ctypes.byref(elapsed), *events)
        return elapsed.value / 1e3
    finally:
        for event in events:
            found.library.cuEventDestroy_v2(event)


def bandwidth_share(buffers: Mapping[str, Buffer], seconds: float) -> float:
    """Share of the nominal bandwidth if every byte of the buffers moves once."""
    moved = sum(buffer.data.nbytes for buffer in buffers.values())
    return moved / seconds / nominal_bandwidth()
