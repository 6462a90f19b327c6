"""Finds a clang that can compile the emulator's headers.

Looked for in this order: `$MSL_CXX`, clang++-29 down to clang++-18, clang++, the `ziglang` wheel. A
candidate must compile a small program that does arithmetic in bfloat16: clang 16 and older cannot.
"""

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.errors import EmulatorError

HOW_TO_GET_ONE = (
    "install one with `pip install ziglang` (any system) or `apt-get install clang-19`, or set "
    "MSL_CXX to a clang++ of version 18 or newer"
)
_PROBE = """
typedef float float4 __attribute__((ext_vector_type(4)));
extern "C" float probe(float x, _Float16 h) {
  __bf16 b = (__bf16)x; b = b * b; float4 v = x; return (float)b + (float)h + v.wzyx.x;
}
"""


@dataclass(frozen=True)
class Compiler:
    """A clang and how to call it.

    Attributes:
        command: The program and its first arguments.
        version: First line of what `--version` says; part of every cache key.
    """

    command: tuple[str, ...]
    version: str

    @property
    def is_zig(self) -> bool:
        """Whether zig's driver wraps the clang, with spellings of its own."""
        return self.command[-1] == "c++" and "zig" in Path(self.command[0]).name

    def ptx_target(self, arch: str) -> tuple[str, ...]:
        """Flags for NVIDIA's architecture `arch`, such as "sm_90"."""
        if self.is_zig:
            return ("--target=nvptx64-cuda", f"-mcpu={arch}+ptx78")
        return ("--target=nvptx64-nvidia-cuda", "-Xclang", "-target-cpu", "-Xclang", arch,
                "-Xclang", "-target-feature", "-Xclang", "+ptx78")  # fmt: skip

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the compiler; the caller looks at the exit status."""
        return _run([*self.command, *arguments])


def cache_folder() -> Path:
    """The folder of compiled kernels: `$MSL_CACHE`, or one in the user's cache."""
    chosen = os.environ.get("MSL_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-gptoss" / "emulator"


def find_compiler() -> Compiler:
    """Return the first compiler that works.

    Raises:
        EmulatorError: There is none, or `$MSL_CXX` names one that does not work, or this is not
            Linux.
    """
    if sys.platform != "linux":
        raise EmulatorError(
            f"the Metal emulator runs on Linux, not on {sys.platform}; on a Mac, run on Metal"
        )
    return _find(os.environ.get("MSL_CXX", ""), str(cache_folder()))


@functools.cache
def _find(chosen: str, _cache: str) -> Compiler:
    if chosen:
        compiler, problem = _probe(_command(chosen))
        if compiler is None:
            raise EmulatorError(f"MSL_CXX={chosen!r} cannot compile Metal kernels: {problem}")
        return compiler
    tried = []
    for command in _candidates():
        compiler, problem = _probe(command)
        if compiler is not None:
            return compiler
        tried.append(f"{' '.join(command)}: {problem}")
    found = "; tried " + "; ".join(tried) if tried else ""
    raise EmulatorError(f"no clang for the Metal emulator{found}; {HOW_TO_GET_ONE}")


def _command(chosen: str) -> tuple[str, ...]:
    """`$MSL_CXX` as a command; `ziglang` stands for the clang of that wheel."""
    if chosen == "ziglang":
        zig = _zig()
        if zig is None:
            raise EmulatorError(f"MSL_CXX=ziglang, but the wheel is missing; {HOW_TO_GET_ONE}")
        return zig
    return tuple(shlex.split(chosen))


def _zig() -> tuple[str, ...] | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    return (str(Path(spec.origin).parent / "zig"), "c++")


def _candidates() -> list[tuple[str, ...]]:
    names = [f"clang++-{version}" for version in range(29, 17, -1)] + ["clang++"]
    found = [(path,) for name in names if (path := shutil.which(name))]
    zig = _zig()
    return [*found, zig] if zig else found


def _probe(command: tuple[str, ...]) -> tuple[Compiler | None, str]:
    """Return the compiler, or None and what is wrong with it."""
    try:
        said = _run([*command, "--version"])
    except OSError as error:
        return None, f"cannot be run: {error.strerror}"
    version = (said.stdout.splitlines() or [""])[0]
    compiler = Compiler(command, version)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe.cpp"
        program.write_text(_PROBE)
        flags = (
            "-std=c++17",
            "-nostdlib++",
            "-fPIC",
            "-c",
            str(program),
            "-o",
            f"{folder}/probe.o",
        )
        result = compiler.run(*flags)
    if result.returncode:
        first = next((x for x in result.stderr.splitlines() if "error" in x), "it fails")
        return None, f"{version or 'unknown version'} cannot compile bfloat16 arithmetic ({first})"
    return compiler, ""


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    zig = str(cache_folder() / "zig")
    environment = {"ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig} | os.environ
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@functools.cache
def machine_flag(*, zig: bool) -> tuple[str, ...]:
    """The instruction set: half and bfloat conversions in hardware where the machine has them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        flags = set(
            Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
        )
    except (OSError, IndexError):
        return ()
    if not {"avx2", "f16c", "fma", "bmi2"} <= flags:
        return ()
    return ("-march=x86_64_v3",) if zig else ("-march=x86-64-v3",)
