"""Compiles Metal kernels for the CPU and runs them with checks that a GPU does not have.

See README.md in this folder. Never imported by the runtime: it needs clang, and exists for tests,
benchmarks and `python -m mlx_gptoss.metal.emulator`.
"""

from mlx_gptoss.metal.emulator.buffer import Buffer
from mlx_gptoss.metal.emulator.build import CompileError, Mode
from mlx_gptoss.metal.emulator.launch import Kernel, KernelFault
from mlx_gptoss.metal.emulator.report import ALLOWABLE, CHECKS, Counts, Finding, Report, Traffic
from mlx_gptoss.metal.emulator.source import read_metal
from mlx_gptoss.metal.emulator.standin import Session, emulate, emulated_metal_kernel
from mlx_gptoss.metal.emulator.strict import check_strict

__all__ = [
    "ALLOWABLE",
    "CHECKS",
    "Buffer",
    "CompileError",
    "Counts",
    "Finding",
    "Kernel",
    "KernelFault",
    "Mode",
    "Report",
    "Session",
    "Traffic",
    "check_strict",
    "emulate",
    "emulated_metal_kernel",
    "read_metal",
]
