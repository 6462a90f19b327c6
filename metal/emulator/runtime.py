"""The compiled runtime, seen through ctypes: a mirror of `runtime/launch.h`."""

import ctypes
import functools
import threading

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator.build import build_runtime

INSTRUMENTED, REVERSE = 1, 2
WRITABLE, INITIALISED = 1, 2
LOAD, STORE = 0, 1

_U32, _I32, _U64, _TEXT = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_char_p


class Site(ctypes.Structure):
    """EmuSite."""

    _fields_ = (("file", _TEXT), ("line", _U32), ("column", _U32))


class BufferRecord(ctypes.Structure):
    """EmuBuffer."""

    _fields_ = (
        ("base", _U64),
        ("size", _U64),
        ("name", _TEXT),
        ("flags", _U32),
        ("reserved", _U32),
        ("distinct_load_sectors", _U64),
        ("distinct_store_sectors", _U64),
        ("bytes_written", _U64),
        ("first_unwritten", _U64),
    )


class LaunchRecord(ctypes.Structure):
    """EmuLaunch."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("grid", _U32 * 3),
        ("threadgroup", _U32 * 3),
        ("table", ctypes.POINTER(ctypes.c_void_p)),
        ("buffers", ctypes.POINTER(BufferRecord)),
        ("threadgroup_buffer_sizes", ctypes.POINTER(_U64)),
        ("threadgroups", ctypes.POINTER(_U64)),
        ("threadgroup_count", _U64),
        ("buffer_count", _U32),
        ("threadgroup_buffer_count", _U32),
        ("options", _U32),
        ("allowed", _U32),
    )


class Accesses(ctypes.Structure):
    """EmuAccesses."""

    _fields_ = (
        ("pc", _U64),
        ("buffer", _I32),
        ("kind", _U32),
        ("instructions", _U64),
        ("lanes", _U64),
        ("bytes", _U64),
        ("sectors", _U64),
        ("lines", _U64),
        ("conflicts", _U64),
    )


class Syncs(ctypes.Structure):
    """EmuSyncs."""

    _fields_ = (("site", Site), ("kind", _U32), ("reserved", _U32), ("count", _U64))


class FindingRecord(ctypes.Structure):
    """EmuFinding."""

    _fields_ = (
        ("check", _U32),
        ("buffer", _I32),
        ("pc", _U64),
        ("site", Site),
        ("occurrences", _U64),
        ("text", ctypes.c_char * 400),
    )


class ResultRecord(ctypes.Structure):
    """EmuResult."""

    _fields_ = (
        ("accesses", ctypes.POINTER(Accesses)),
        ("syncs", ctypes.POINTER(Syncs)),
        ("findings", ctypes.POINTER(FindingRecord)),
        ("access_count", _U32),
        ("sync_count", _U32),
        ("finding_count", _U32),
        ("stopped", _U32),
        ("image_base", _U64),
        ("threadgroup_bytes", _U64),
        ("threadgroups_run", _U64),
    )


class Parameter(ctypes.Structure):
    """EmuParameter, which a kernel's library describes its parameters with (signature.py)."""

    _fields_ = (("dtype", _TEXT), ("size", _U32), ("read_only", _U32), ("reference", _U32))


# The runtime has one state: launches of different Python threads take turns.
lock = threading.Lock()


@functools.cache
def library() -> ctypes.CDLL:
    """Load the runtime; kernels loaded later find its functions."""
    found = ctypes.CDLL(str(build_runtime()), mode=ctypes.RTLD_GLOBAL)
    found.emu_allocate.restype = ctypes.c_void_p
    found.emu_allocate.argtypes = [_U64]
    found.emu_free_all.restype = None
    found.emu_run.restype = ctypes.POINTER(ResultRecord)
    found.emu_run.argtypes = [ctypes.POINTER(LaunchRecord)]
    return found


def allocate(size: int) -> int:
    """Return the address of `size` zero bytes on the guarded device heap.

    Raises:
        EmulatorError: The heap is full.
    """
    address = library().emu_allocate(size)
    if not address:
        raise EmulatorError(f"the emulator's heap cannot hold another buffer of {size} bytes")
    return address


def free_all() -> None:
    """Release every buffer of the device heap."""
    library().emu_free_all()
