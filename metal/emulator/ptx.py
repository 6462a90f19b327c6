"""Compiles kernels to NVIDIA's PTX, from the same source and headers.

A second compiler's view of a kernel: whether its local arrays stay in registers, how many registers
it takes, which instructions its inner loop is made of. The figures are NVIDIA's, not Apple's, and
serve to compare variants of a kernel. Where an NVIDIA GPU is at hand, `cuda.py` runs the result.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator.build import build_ptx
from mlx_gptoss.metal.emulator.signature import Parameter, binding_prelude, bound, parameters_of
from mlx_gptoss.metal.emulator.source import prepare, rewrite_threadgroup_variables, specialise

ENTRY = "emu_entry"
_INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:\.[\w:]+)*)[\s;]", re.M)


@dataclass(frozen=True)
class PtxKernel:
    """A kernel as PTX.

    Attributes:
        name: Of the kernel.
        parameters: Of the function; buffers are the entry's arguments, in this order.
        text: The PTX, with `.loc` lines of the .metal source.
        stack_bytes: Local memory per thread: arrays that do not fit registers or are indexed by a
            variable. It should be 0.
        shared_bytes: Threadgroup memory.
        instructions: How often each opcode occurs in the text; a loop body counts once.
        registers: 32-bit registers per thread by `ptxas`, None without it.
        spill_bytes: Bytes spilled by `ptxas`, None without it.
    """

    name: str
    parameters: tuple[Parameter, ...]
    text: str
    stack_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    registers: int | None
    spill_bytes: int | None


def _shared_variable(number: int, kind: str, name: str, dimensions: str) -> str:
    t = f"emu_variable_{number}"
    return (
        f"typedef {kind} {t}{dimensions}; "
        f"static __attribute__((address_space(3))) {t} emu_shared_{number}; "
        f"{t}& {name} = *({t}*)&emu_shared_{number};"
    )


def emit(
    source: str,
    function: str,
    *,
    arch: str = "sm_90",
    constants: Mapping[str, bool | int | float] | None = None,
) -> str:
    """Compile a kernel to the text of its PTX; arguments and errors are those of `build`."""
    return _emit(source, function, arch, constants)[1]


def build(
    source: str,
    function: str,
    *,
    arch: str = "sm_90",
    constants: Mapping[str, bool | int | float] | None = None,
) -> PtxKernel:
    """Compile a kernel to PTX.

    Args:
        source: Metal source, see `read_metal`.
        function: Name, host name or template instance, as for `Kernel`.
        arch: NVIDIA architecture.
        constants: Values of the function constants, compiled in.

    Raises:
        CompileError: It does not compile, or the compiler has no NVPTX back end.
        EmulatorError: There is no such function, or it takes `[[threadgroup(n)]]` arguments.
    """
    parameters, ptx = _emit(source, function, arch, constants)
    registers, spill = _ptxas(ptx, arch)
    body = ptx[ptx.index(".visible .entry") :]
    return PtxKernel(
        name=function,
        parameters=tuple(parameters),
        text=ptx,
        stack_bytes=_bytes(r"\.local\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", ptx),
        shared_bytes=_bytes(r"\.shared\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", ptx),
        instructions=Counter(_INSTRUCTION.findall(body)),
        registers=registers,
        spill_bytes=spill,
    )


def _emit(
    source: str, function: str, arch: str, constants: Mapping[str, bool | int | float] | None
) -> tuple[list[Parameter], str]:
    prepared = prepare(source)
    instance = prepared.instances.get(function, function)
    parameters = parameters_of(prepared, instance.split("<")[0].strip())
    if any(p.kind == "threadgroup" for p in parameters):
        raise EmulatorError(f"kernel '{function}': [[threadgroup(n)]] arguments have no PTX form")
    text = specialise(prepared, constants or {})
    text = rewrite_threadgroup_variables(text, _shared_variable)
    return parameters, build_ptx(text + _entry(parameters, instance), name=function, arch=arch)


def _entry(parameters: list[Parameter], instance: str) -> str:
    arguments, values = [], []
    for number, p in enumerate(parameters):
        if p.kind == "buffer":
            arguments.append(f"void* p{number}")
        values.append(bound(number, p, buffer=f"p{number}", thread="t."))
    return (
        f'{binding_prelude(instance)}extern "C" __attribute__((nvptx_kernel)) void '
        f"{ENTRY}({', '.join(arguments)}) {{\nEmuThread t = emu_this_thread();\n"
        f"{instance}({', '.join(values)});\n}}\n"
    )


def _bytes(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))


def _ptxas(ptx: str, arch: str) -> tuple[int | None, int | None]:
    """Registers and spilled bytes by NVIDIA's assembler, where it is installed."""
    program = shutil.which("ptxas")
    if program is None:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [program, f"-arch={arch}", "-v", str(path), "-o", f"{folder}/kernel.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EmulatorError(f"ptxas refuses the PTX: {result.stderr.strip()[:1000]}")
    said = result.stdout + result.stderr
    registers = re.search(r"Used (\d+) registers", said)
    spill = re.search(r"(\d+) bytes spill stores", said)
    return int(registers[1]) if registers else None, int(spill[1]) if spill else 0
