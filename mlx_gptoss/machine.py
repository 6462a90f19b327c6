"""What this machine is: chip, memory, macOS, power, and the memory that Metal lets the GPU use.

Every fact comes from one command of macOS or from MLX, and is None where it cannot be read: on
another system, in a sandbox, or when a command changes its output. Nothing here raises and nothing
is changed. The formats are those of macOS 13 to 26.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.chips import Chip, default_working_set_bytes, find_chip
from mlx_gptoss.errors import MachineError

Run = Callable[[tuple[str, ...]], str | None]

MIB = 2**20
MEMORY_LEVELS = {1: "normal", 2: "warning", 4: "critical"}  # as of DISPATCH_MEMORYPRESSURE_*
THERMAL_LEVELS = dict(enumerate(("nominal", "moderate", "heavy", "trapping", "sleeping")))
TIMEOUT_S = 15  # system_profiler needs a few seconds on a cold machine


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts for a plan, a diagnosis or the record of a measurement; None is "could not be read"."""

    system: str
    architecture: str
    os_version: str
    cpu: str | None = None
    cpu_cores: int | None = None
    model: str | None = None
    gpu_cores: int | None = None
    memory_bytes: int | None = None
    wired_limit_bytes: int | None = None
    working_set_bytes: int | None = None
    gpu_architecture: str | None = None
    power_source: str | None = None
    low_power_mode: bool | None = None
    thermal_pressure: str | None = None

    @property
    def chip(self) -> Chip | None:
        """The row of `chips.CHIPS`, or None on a machine that is no Mac with Apple silicon."""
        if self.system != "Darwin" or self.cpu is None:
            return None
        with contextlib.suppress(MachineError):
            return find_chip(self.cpu, gpu_cores=self.gpu_cores, memory_bytes=self.memory_bytes)
        return None

    @property
    def gpu_limit_bytes(self) -> int | None:
        """What the GPU may use: Metal's answer, else the limit set by hand, else the default."""
        if self.working_set_bytes is not None:
            return self.working_set_bytes
        if self.wired_limit_bytes is not None:
            return self.wired_limit_bytes
        if self.memory_bytes is None:
            return None
        if self.system != "Darwin":
            return self.memory_bytes
        return default_working_set_bytes(self.memory_bytes)


def read_machine(run: Run | None = None) -> Machine:
    """Ask this machine.

    Args:
        run: executes a command and returns its stdout, None if it failed (for tests).

    Returns:
        The facts that could be read.
    """
    run = run or run_command
    system = platform.system()
    if system == "Darwin":
        return _read_mac(run)
    return Machine(
        system=system,
        architecture=platform.machine(),
        os_version=platform.release(),
        cpu=_linux_cpu(),
        cpu_cores=os.cpu_count(),
        memory_bytes=_linux_memory_bytes(),
    )


def read_thermal_pressure(run: Run | None = None) -> str | None:
    """How hot a Mac is: the level that `thermald` publishes, else what `pmset` complains of.

    The names are those of libkern/OSThermalNotification.h; `powermetrics` shows the same to root.
    """
    run = run or run_command
    level = run(("notifyutil", "-g", "com.apple.system.thermalpressurelevel"))
    if found := re.search(r"thermalpressurelevel (\d)\s*$", level or ""):
        return THERMAL_LEVELS.get(int(found[1]), f"level {found[1]}")
    if not (text := (run(("pmset", "-g", "therm")) or "").strip()):
        return None
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    if limit and int(limit[1]) < 100:
        return f"speed limited to {limit[1]} %"
    warnings = [
        line.strip()
        for line in text.splitlines()
        if "warning level" in line and "has been recorded" not in line
    ]
    return warnings[0] if warnings else "nominal"


def read_memory_pressure(run: Run | None = None) -> str | None:
    """How short of memory a Mac is, in the kernel's own words; at "warning" it begins to swap."""
    run = run or run_command
    level = _integer(run(("sysctl", "-n", "kern.memorystatus_vm_pressure_level")))
    return None if level is None else MEMORY_LEVELS.get(level, f"level {level}")


def run_command(command: tuple[str, ...]) -> str | None:
    """Stdout of a command that only reads; None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _read_mac(run: Run) -> Machine:
    wired_mib = _integer(run(("sysctl", "-n", "iogpu.wired_limit_mb")))
    metal = _metal_info()
    return Machine(
        system="Darwin",
        architecture=platform.machine(),
        os_version=_text(run(("sw_vers", "-productVersion"))) or platform.mac_ver()[0],
        cpu=_text(run(("sysctl", "-n", "machdep.cpu.brand_string"))),
        cpu_cores=_integer(run(("sysctl", "-n", "hw.physicalcpu"))),
        model=_text(run(("sysctl", "-n", "hw.model"))),
        gpu_cores=_gpu_cores(run(("system_profiler", "SPDisplaysDataType", "-json"))),
        memory_bytes=_integer(run(("sysctl", "-n", "hw.memsize"))) or metal.get("memory_size"),
        # 0 is macOS's way to say that the default is in force
        wired_limit_bytes=wired_mib * MIB if wired_mib else None,
        working_set_bytes=metal.get("max_recommended_working_set_size"),
        gpu_architecture=metal.get("architecture"),
        power_source=_power_source(run(("pmset", "-g", "batt"))),
        low_power_mode=_low_power_mode(run(("pmset", "-g"))),
        thermal_pressure=read_thermal_pressure(run),
    )


def _metal_info() -> dict[str, Any]:
    """`mx.device_info` of the GPU; empty where MLX is missing or has no Metal."""
    try:
        import mlx.core as mx

        return dict(mx.device_info(mx.Device(mx.gpu))) if mx.metal.is_available() else {}
    except (ImportError, RuntimeError, ValueError):
        return {}


def _text(output: str | None) -> str | None:
    return (output or "").strip() or None


def _integer(output: str | None) -> int | None:
    text = (output or "").strip()
    return int(text) if text.isdecimal() else None


def _gpu_cores(output: str | None) -> int | None:
    """`sppci_cores` of the first display adapter of `system_profiler SPDisplaysDataType -json`."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        for adapter in json.loads(output or "{}").get("SPDisplaysDataType", []):
            if cores := _integer(str(adapter.get("sppci_cores", ""))):
                return cores
    return None


def _power_source(output: str | None) -> str | None:
    """The quoted words of `Now drawing from 'AC Power'`."""
    found = re.search(r"Now drawing from '([^']+)'", output or "")
    return found[1] if found else None


def _low_power_mode(output: str | None) -> bool | None:
    """`lowpowermode 1`, or `powermode 1` on machines that also have a high-power mode (2)."""
    for name in ("lowpowermode", "powermode"):
        if found := re.search(rf"^\s*{name}\s+(\d)\s*$", output or "", re.MULTILINE):
            return found[1] == "1"
    return None


def _linux_cpu() -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        return found[1] if found else None
    return None


def _linux_memory_bytes() -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
        return int(found[1]) * 1024 if found else None
    return None
