"""The parameters of a kernel function and the C++ entry point that binds them.

Metal numbers buffers by `[[buffer(n)]]` or, without it, by the next free index. Types are not
parsed here: the entry point describes them, and `launch` compares them with the buffers.
"""

import re
from dataclasses import dataclass
from typing import Literal

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator.source import MetalSource

THREAD_ATTRIBUTES = {  # Metal's name: member of EmuThread (msl_abi.h)
    name: name
    for name in (
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threads_per_threadgroup",
        "dispatch_threads_per_threadgroup",
        "threads_per_grid",
        "threadgroups_per_grid",
        "thread_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "simdgroup_index_in_threadgroup",
        "simdgroups_per_threadgroup",
        "dispatch_simdgroups_per_threadgroup",
        "threads_per_simdgroup",
        "quadgroup_index_in_threadgroup",
        "thread_index_in_quadgroup",
        "quadgroups_per_threadgroup",
    )
} | {"grid_size": "threads_per_grid", "thread_execution_width": "threads_per_simdgroup"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel function.

    Attributes:
        name: As declared.
        kind: A buffer, a `[[threadgroup(n)]]` pointer, or a value that describes the thread.
        index: Of the buffer or threadgroup argument; 0 for a thread value.
        member: Of EmuThread, for a thread value.
        constant: Whether it is declared in the constant address space.
    """

    name: str
    kind: Literal["buffer", "threadgroup", "thread"]
    index: int
    member: str
    constant: bool


def _split(parameters: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(parameters):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(parameters[start:at])
            start = at + 1
    return [p.strip() for p in (*parts, parameters[start:]) if p.strip()]


def parameters_of(source: MetalSource, function: str) -> list[Parameter]:
    """Return the parameters of a kernel function in order.

    Raises:
        EmulatorError: There is no such function, or a parameter has no binding.
    """
    text = source.signatures
    match = re.search(rf"\bvoid\s+{re.escape(function)}\s*\(", text)
    if match is None:
        names = re.findall(r"(?:\bkernel\b|\[\[\s*kernel\s*\]\])\s+void\s+(\w+)", text)
        known = ", ".join(sorted({*names, *source.instances})) or "none"
        raise EmulatorError(f"kernel {function!r} not found; the source has {known}")
    end, depth = match.end(), 1
    while depth and end < len(text):
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    declarations = _split(text[match.end() : end - 1])
    taken = {int(n) for d in declarations for n in re.findall(r"\bbuffer\(\s*(\d+)\s*\)", d)}
    found = []
    for declaration in declarations:
        parameter = _parameter(declaration, function, taken)
        if parameter.kind == "buffer":
            taken.add(parameter.index)
        found.append(parameter)
    return found


def _parameter(declaration: str, function: str, taken: set[int]) -> Parameter:
    attributes = " ".join(re.findall(r"\[\[(.*?)\]\]", declaration, re.S))
    plain = re.sub(r"\[\[.*?\]\]", "", declaration, flags=re.S).strip()
    name_match = re.search(r"(\w+)\s*(?:\[\w*\])?$", plain)
    if name_match is None:
        raise EmulatorError(f"kernel {function!r}: parameter {plain!r} has no name")
    name = name_match.group(1)
    word = next((w for w in re.findall(r"\w+", attributes) if w in THREAD_ATTRIBUTES), None)
    if word is not None:
        return Parameter(name, "thread", 0, THREAD_ATTRIBUTES[word], constant=False)
    shared = re.search(r"\bthreadgroup\(\s*(\d+)\s*\)", attributes)
    if shared is not None:
        return Parameter(name, "threadgroup", int(shared.group(1)), "", constant=False)
    if "*" not in plain and "&" not in plain and "[" not in plain:
        raise EmulatorError(
            f"kernel {function!r}: parameter {plain!r} is neither a buffer nor one of Metal's "
            f"attributes that the emulator knows ([[{attributes}]])"
        )
    explicit = re.search(r"\bbuffer\(\s*(\d+)\s*\)", attributes)
    index = int(explicit.group(1)) if explicit else next(i for i in range(99) if i not in taken)
    return Parameter(name, "buffer", index, "", constant=bool(re.search(r"\bconstant\b", plain)))


def _type(number: int) -> str:
    return f"typename emu_type_at<{number}, emu_parameters_of>::type"


def binding_prelude(instance: str) -> str:
    """C++ that makes the parameter types of a kernel function available to an entry point."""
    return (
        f'\n#line 1 "entry point"\n#undef kernel\n#include "msl_entry.h"\n'
        f"using emu_parameters_of = typename emu_signature<decltype({instance})>::types;\n"
    )


def bound(number: int, parameter: Parameter, *, buffer: str, thread: str) -> str:
    """C++ of the argument for a parameter.

    Args:
        number: Its position.
        parameter: What it is.
        buffer: C++ of the buffer's address.
        thread: C++ that, before a member's name, reads it from the thread.
    """
    if parameter.kind == "thread":
        return f"emu_bind<{_type(number)}>::value({thread}{parameter.member})"
    return f"emu_bind<{_type(number)}>::pointer({buffer})"


def entry_point(parameters: list[Parameter], instance: str) -> str:
    """C++ of `emu_entry`, which calls the kernel for the running thread, and of its description."""
    arguments = []
    for number, p in enumerate(parameters):
        table = "buffers" if p.kind == "buffer" else "threadgroup_buffers"
        arguments.append(bound(number, p, buffer=f"t->{table}[{p.index}]", thread="t->"))
    described = ", ".join(f"emu_describe<{_type(n)}>::value" for n in range(len(parameters)))
    return (
        f'{binding_prelude(instance)}extern "C" {{ extern const EmuParameter emu_parameters[];\n'
        f"const EmuParameter emu_parameters[] = {{ {described} }};\n"
        f"void emu_entry() {{ EmuThread* t = emu_thread;\n"
        f"{instance}({', '.join(arguments)});\n}} }}\n"
    )
