"""Reads PTX: each instruction, the source lines it comes from, and who reads what it writes.

The lines are those that clang 20 and later write beside a `.loc`, with the calls they were inlined
through; older ones name the innermost line only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:\.[\w:]+)*)(?:\s+(.*?))?;")
_PLACE = re.compile(r"([^\s\[\]@]+):(\d+):\d+")
_LOOP = re.compile(r"\s+//.*Loop.* Depth=")
_REGISTER = re.compile(r"%[a-z]+\d+")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        opcode: With its types, such as "fma.rn.f32".
        writes: Registers it sets.
        reads: Registers it takes, other than in an address.
        address: What stands in brackets: a register, perhaps plus a number.
        places: File and line it comes from, innermost first, then where that was inlined; line 0
            where the compiler joined instructions of several.
        depth: Of loops around it, by the compiler's comments.
    """

    opcode: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    address: tuple[str, ...]
    places: tuple[tuple[str, int], ...]
    depth: int


def instructions(text: str) -> list[Instruction]:
    """The instructions of the kernel's function, without the entry point that `ptx.build` adds."""
    found: list[Instruction] = []
    places: tuple[tuple[str, int], ...] = ()
    depth = 0
    for line in text.split(".visible .entry")[0].splitlines():
        if line.lstrip().startswith(".loc"):
            places = tuple((file, int(n)) for file, n in _PLACE.findall(line.partition("//")[2]))
        elif line.startswith(("$L__BB", "// %bb.")) or _LOOP.match(line):
            depth = max([0, *map(int, re.findall(r"Depth=(\d+)", line))])
        elif match := _INSTRUCTION.match(line):
            found.append(_instruction(match[1], match[2] or "", places, depth))
    return found


def _instruction(
    opcode: str, operands: str, places: tuple[tuple[str, int], ...], depth: int
) -> Instruction:
    plain = re.sub(r"\[.*?\]", "", operands)
    first, _, rest = plain.partition("}," if plain.startswith("{") else ",")
    if opcode.startswith(("st.", "bra", "bar")):
        first, rest = "", plain
    return Instruction(
        opcode=opcode,
        writes=tuple(_REGISTER.findall(first)),
        reads=tuple(_REGISTER.findall(rest)),
        address=tuple(re.findall(r"\[(.*?)\]", operands)),
        places=places,
        depth=depth,
    )


def free_on_apple(code: Sequence[Instruction]) -> set[int]:
    """Indices of instructions that Apple's GPUs are reported not to need.

    By the reverse-engineered instruction set of the M1 (https://dougallj.github.io/applegpu/docs.html):

    - either half of a register is an operand by itself, so nothing splits a word into halves;
    - `fmadd`, `fadd` and `fmul` take halves among 32-bit operands, so nothing widens them;
    - `device_load` adds a base of 64 bits and an index of 32, shifted left by up to 4, so nothing
      widens an index and adds it to a base, unless a constant is to be added besides.
    """
    readers: dict[str, list[int]] = {}
    addresses: dict[str, set[str]] = {}
    for at, one in enumerate(code):
        for name in one.reads:
            readers.setdefault(name, []).append(at)
        for address in one.address:
            addresses.setdefault(address.split("+")[0], set()).add(address)

    def where(pattern: str, accepted: set[int]) -> set[int]:
        """Instructions of whose results none is read by an instruction outside `accepted`."""
        return {
            at
            for at, one in enumerate(code)
            if re.fullmatch(pattern, one.opcode)
            and all(reader in accepted for name in one.writes for reader in readers.get(name, ()))
        }

    floats = {
        at for at, one in enumerate(code) if re.match(r"(fma|add|sub|mul)\..*f32", one.opcode)
    }
    splits = {at for at, one in enumerate(code) if one.opcode == "mov.b32" and len(one.writes) == 2}
    sums = {
        at
        for at in where(r"add\.s64", set())
        if all(addresses.get(name) == {name} for name in code[at].writes)
    }
    widened = {
        at
        for at in where(r"mul\.wide\.u32|cvt\.u64\.u32", sums)
        if not any(name in addresses for name in code[at].writes)
    }
    return splits | where(r"cvt\.f32\.f16", floats) | sums | widened
