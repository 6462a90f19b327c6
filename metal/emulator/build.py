"""Compiles kernels and the runtime to shared libraries, once per content.

A library's name is the hash of everything that went into it, and it appears by renaming: concurrent
test processes may build the same kernel, none sees half of one.
"""

import functools
import hashlib
import os
import re
import tempfile
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator.compiler import Compiler, cache_folder, find_compiler, machine_flag


class Mode(StrEnum):
    """How a kernel is compiled.

    INSTRUMENTED calls a check at every load and store; PLAIN runs at full speed, with guard pages
    around the buffers as the only check.
    """

    INSTRUMENTED = "instrumented"
    PLAIN = "plain"


class CompileError(EmulatorError):
    """A kernel does not compile; the message names the lines of the .metal file."""


_LANGUAGE = (
    "-std=c++17", "-nostdlib++", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-fno-sanitize=undefined",
)  # fmt: skip
_LIBRARY = ("-fPIC", "-shared", "-fno-stack-protector", "-lm")
_DIAGNOSTICS = (
    "-Wno-everything", "-Werror=return-type", "-ferror-limit=8", "-fno-caret-diagnostics",
)  # fmt: skip
_KERNEL = (
    "-O2", "-gline-tables-only", "-gdwarf-4", *_DIAGNOSTICS,
    "-fstack-clash-protection",  # a large array cannot step over the guard of a thread's stack
    # Metal has no double: literals are float, 16-bit arithmetic rounds at every step.
    "-cl-single-precision-constant", "-Xclang", "-fbfloat16-excess-precision=none",
    "-Xclang", "-ffloat16-excess-precision=none", "-ffp-contract=on", "-fno-math-errno",
    # Loads must stay what the source says: no merging, no narrowing.
    "-fno-strict-aliasing", "-fno-vectorize", "-fno-slp-vectorize",
    "-mllvm", "-disable-vector-combine", "-mllvm", "-aggressive-instcombine-max-scan-instrs=0",
)  # fmt: skip
_PTX = (
    "-S", "-O3", "-gline-tables-only", "-ffreestanding", "-nostdlibinc", *_DIAGNOSTICS,
    "-cl-single-precision-constant", "-ffp-contract=on", "-fno-math-errno",
)  # fmt: skip
_INSTRUMENTED = (
    "-fsanitize=kernel-address", "-mllvm", "-asan-instrumentation-with-call-threshold=0",
    "-mllvm", "-asan-globals=0", "-mllvm", "-asan-stack=0",
    # without it the store of `a[i] += b` would go unseen: its address was checked for the load
    "-mllvm", "-asan-opt=0",
    "-mllvm", "-asan-kernel-mem-intrinsic-prefix=1",
    "-fsanitize=alignment,bounds,integer-divide-by-zero",
    "-fno-sanitize-recover=alignment,bounds,integer-divide-by-zero",
    # arrays of a thread reached through a pointer: a trap, found after inlining
    "-fsanitize=local-bounds", "-fsanitize-trap=local-bounds",
    "-mllvm", "-disable-loop-idiom-all",  # a loop made a memset would escape it
)  # fmt: skip


@functools.cache
def header_folder() -> Path:
    """The folder of the headers; also the root of `runtime/`."""
    with as_file(files("mlx_gptoss.metal.emulator")) as folder:
        return folder


@functools.cache
def _headers_hash() -> str:
    digest = hashlib.sha256()
    for name in ("msl", "runtime"):
        for path in sorted((header_folder() / name).iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build_kernel(text: str, *, name: str, mode: Mode) -> Path:
    """Compile C++ with the headers of `msl/` to a shared library.

    Args:
        text: Prepared source with an entry point.
        name: Of the kernel; a readable part of the file name, and of error messages.
        mode: Instrumented or plain.

    Raises:
        CompileError: It does not compile.
    """
    flags = _KERNEL + (_INSTRUMENTED if mode is Mode.INSTRUMENTED else ())
    return _build(f"#include <metal_stdlib>\n{text}", name=name, flags=flags)


def build_strict(text: str) -> None:
    """Compile prepared source with real address spaces; raises CompileError where they clash."""
    flags = ("-O0", "-DMSL_STRICT", *_DIAGNOSTICS, "-cl-single-precision-constant")
    _build(f"#include <metal_stdlib>\n{text}", name="strict", flags=flags)


def build_ptx(text: str, *, name: str, arch: str) -> str:
    """Compile prepared source with a PTX entry point to PTX.

    Raises:
        CompileError: It does not compile, or the compiler has no NVPTX back end.
    """
    flags = (*_PTX, *find_compiler().ptx_target(arch))
    text = f"#define MSL_PTX 1\n#include <metal_stdlib>\n{text}"
    return _build(text, name=name, flags=flags, suffix=".ptx").read_text()


def build_runtime() -> Path:
    """Compile the fiber runtime to a shared library."""
    text = (header_folder() / "runtime" / "runtime.cpp").read_text()
    return _build(text, name="runtime", flags=("-O2",))


def _build(text: str, *, name: str, flags: tuple[str, ...], suffix: str = ".so") -> Path:
    compiler = find_compiler()
    host = (*_LIBRARY, *machine_flag(zig=compiler.is_zig)) if suffix == ".so" else ()
    flags = (*_LANGUAGE, *flags, *host)
    key = hashlib.sha256("\0".join((text, *flags, compiler.version, _headers_hash())).encode())
    stem = re.sub(r"\W+", "_", name)[:60]
    product = cache_folder() / f"{stem}-{key.hexdigest()[:20]}{suffix}"
    if not product.exists():
        product.parent.mkdir(parents=True, exist_ok=True)
        includes = (f"-I{header_folder() / 'msl'}", f"-I{header_folder() / 'runtime'}")
        _compile(compiler, text, name=name, flags=(*includes, *flags), product=product)
    return product


def _compile(
    compiler: Compiler, text: str, *, name: str, flags: tuple[str, ...], product: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=product.parent, prefix="building-") as folder:
        program, output = Path(folder) / "kernel.cpp", Path(folder) / f"kernel{product.suffix}"
        program.write_text(text, encoding="utf-8")
        result = compiler.run(str(program), *flags, "-o", str(output))
        if result.returncode or not output.exists():
            raise CompileError(f"kernel {name!r} does not compile:\n{_diagnostics(result.stderr)}")
        os.replace(output, product)


def _diagnostics(stderr: str) -> str:
    """The errors of a compiler's output, first lines only."""
    lines = [x for x in stderr.splitlines() if re.search(r"\berror:|\bnote: in inst", x)]
    lines = [
        x for x in lines if not x.startswith("entry point:")
    ] or lines  # what follows from them
    said = "\n".join(lines[:12]) or stderr.strip()[:2000]
    return re.sub(
        r"attempt to use a poisoned identifier.*", "double: Metal has no such type, use float", said
    )
