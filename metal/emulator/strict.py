"""Compiles a kernel with real address spaces, for the mistakes that erasing them hides.

`device`, `constant` and `threadgroup` become clang's address_space attributes, so a pointer into
one space cannot become a pointer into another, and `constant` data cannot be written. One thing
that Metal allows is refused: copying or default-constructing a whole struct that lies in one of
the spaces, for which C++ has no copy constructor. Read its members instead.
"""

import re
from collections.abc import Sequence

from mlx_gptoss.metal.emulator.build import build_strict
from mlx_gptoss.metal.emulator.source import prepare, rewrite_threadgroup_variables, specialise


def _static_variable(_number: int, kind: str, name: str, dimensions: str) -> str:
    """A threadgroup variable as C++ allows it: automatic storage has no address space."""
    return f"static threadgroup {kind} {name}{dimensions};"


def check_strict(source: str, *functions: str) -> None:
    """Check the address spaces of Metal source.

    Args:
        source: Metal source, see `read_metal`.
        functions: Host names, or instances of templates to check besides the explicit
            instantiations, such as `"rms<float>"`: the body of a template that is never
            instantiated is half checked.

    Raises:
        CompileError: An address space is wrong.
    """
    prepared = prepare(source)
    named = [prepared.instances.get(f, f) for f in functions]
    constants = dict.fromkeys(prepared.function_constants, 0)
    text = rewrite_threadgroup_variables(specialise(prepared, constants), _static_variable)
    # `constant int shape[4]` as a parameter is a pointer
    text = re.sub(r"(\bconstant\s+(?:const\s+)?\w+)\s+(\w+)\[\w*\](?=\s*[,)])", r"\1* \2", text)
    build_strict(text + _instantiations([*prepared.instances.values(), *named]))


def _instantiations(instances: Sequence[str]) -> str:
    lines = [f"auto emu_instance_{n} = &{x};" for n, x in enumerate(instances)]
    return '\n#line 1 "instances"\n#undef kernel\n' + "\n".join(lines) + "\n"
