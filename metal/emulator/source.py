"""Turns Metal source text into C++ that clang compiles against the headers of `msl/`.

Little needs to change, because the headers give C++ Metal's types and functions: attributes and
comments go, the local includes are inlined, and variables in threadgroup memory, which C++ has no
notion of, become references into the threadgroup's arena. Every rewriting keeps the line count,
and `#line` directives of the text are honoured, so that clang's messages and the debug information
speak of the .metal file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.errors import EmulatorError

_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.S)
_INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]')
_ATTRIBUTE = re.compile(r"\[\[\s*[a-z_]+[^\[\]]*\]\]")
_INSTANCE = re.compile(r'template\s*\[\[\s*host_name\("([^"]*)"\)\s*\]\]([^;]*);')
_FUNCTION_CONSTANT = re.compile(
    r"\bconstant\s+(?:const\s+)?(\w+)\s+(\w+)\s*\[\[\s*function_constant\("
)
_THREADGROUP_VARIABLE = re.compile(
    r"(?P<before>(?:[;{}]|^[ \t]*#[^\n]*\n)\s*)(?:alignas\([^)]*\)\s*)?threadgroup\s+"
    r"(?P<type>(?:[\w:]+(?:<[^;{}()]*>)?\s+)+)(?P<variables>\w+\s*(?:\[[^;]*)?);",
    re.M,
)
_MISSED_VARIABLE = re.compile(r"(?<!static )\bthreadgroup\s[^*&();{}]*;")


@dataclass(frozen=True)
class MetalSource:
    """Metal source made ready for C++, except for its threadgroup variables.

    Attributes:
        text: The source without comments, attributes and explicit instantiations.
        signatures: The source as `text`, but with attributes: what parameters are read from.
        instances: C++ expression of each explicit instantiation, by its host name.
        function_constants: Type of each function constant, by its name.
    """

    text: str
    signatures: str
    instances: dict[str, str]
    function_constants: dict[str, str]


def strip_comments(text: str) -> str:
    """Return the text with every comment blanked, strings and line numbers kept."""

    def blank(match: re.Match[str]) -> str:
        found = match.group(0)
        return found if found.startswith('"') else _line_ends(found) or " "

    return _COMMENT.sub(blank, text)


def _line_ends(text: str) -> str:
    """The line ends of a text, those of a macro's continued lines with their backslash."""
    return "".join(re.findall(r"\\?\n", text))


def read_metal(*paths: Path, roots: Sequence[Path] = (), skip: Sequence[str] = ()) -> str:
    """Read .metal files as one text and inline what they include, each file once.

    Args:
        paths: The files to read, in this order.
        roots: Folders in which includes are looked up, after the folder of the including file.
        skip: Endings of include paths that are left out.

    Returns:
        One text with `#line` directives naming the files.

    Raises:
        EmulatorError: A file is missing.
    """
    seen: set[Path] = set()
    texts = []
    for path in map(Path, paths):
        if path.resolve() not in seen:
            texts.append(_inline(path, tuple(roots), tuple(skip), seen=seen))
    return "\n".join(texts)


def _inline(path: Path, roots: tuple[Path, ...], skip: tuple[str, ...], *, seen: set[Path]) -> str:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise EmulatorError(f"{path}: cannot read Metal source: {error.strerror}") from error
    seen.add(path.resolve())
    out = [f'#line 1 "{path}"']
    for number, line in enumerate(lines, 1):
        include = _INCLUDE.match(line)
        if include is None:
            out.append(line)
            continue
        name = include.group(2)
        if include.group(1) == "<" and (name.startswith(("metal_", "simd/")) or "/" not in name):
            out.append("")  # the prelude has it
            continue
        found = next((f / name for f in (path.parent, *roots) if (f / name).is_file()), None)
        if found is None:
            raise EmulatorError(f"{path}:{number}: included file {name!r} not found")
        if found.resolve() in seen or name.endswith(skip or ("\0",)):
            out.append("")
            continue
        out += [_inline(found, roots, skip, seen=seen), f'#line {number + 1} "{path}"']
    return "\n".join(out)


def prepare(text: str) -> MetalSource:
    """Strip what C++ does not know from Metal source, and note what it said."""
    text = strip_comments(text)
    text = re.sub(r"(?m)^\s*#\s*(?:pragma|include\s*<metal_|include\s*<simd/).*$", "", text)
    instances = {name: _instance(declaration) for name, declaration in _INSTANCE.findall(text)}
    text = _INSTANCE.sub(lambda m: _line_ends(m.group(0)), text)
    constants = {name: kind for kind, name in _FUNCTION_CONSTANT.findall(text)}
    plain = _ATTRIBUTE.sub(lambda m: _line_ends(m.group(0)), text)
    return MetalSource(plain, text, instances, constants)


def _instance(declaration: str) -> str:
    """What an explicit instantiation declares: `f<float>` of `kernel decltype(f<float>) f<float>`.

    The type may also be a typedef's name, or `void` with parameters behind the instance.
    """
    text = _ATTRIBUTE.sub("", declaration).strip()
    if text.endswith(")"):
        text = text[: _opening(text, "()")].rstrip()
    start = _opening(text, "<>") if text.endswith(">") else len(text)
    name = re.search(r"[\w:]+\s*$", text[:start])
    if name is None:
        raise EmulatorError(f"explicit instantiation not understood: {' '.join(text.split())!r}")
    return text[name.start() :]


def _opening(text: str, pair: str) -> int:
    """Where the bracket opens that the last character of a text closes."""
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth += (text[at] == pair[1]) - (text[at] == pair[0])
        if depth == 0:
            return at
    return 0


def specialise(source: MetalSource, constants: Mapping[str, bool | int | float]) -> str:
    """Compile values of function constants in, as Metal does when it makes a pipeline.

    A constant without a value may be declared, but not used: it becomes an undefined symbol.

    Raises:
        EmulatorError: A value is for no function constant of the source.
    """
    unknown = sorted(set(constants) - set(source.function_constants))
    if unknown:
        known = ", ".join(source.function_constants) or "none"
        raise EmulatorError(f"no function constant {', '.join(unknown)}; the source has {known}")
    text = source.text
    for name, kind in source.function_constants.items():
        value = constants.get(name)
        literal = str(value).lower() if isinstance(value, bool) else str(value)
        given = f"constexpr {kind} {name} = {kind}({literal});"
        defined = rf"\bis_function_constant_defined\(\s*{name}\s*\)"
        text = re.sub(defined, str(name in constants).lower(), text)
        declaration = rf"\bconstant\s+(?:const\s+)?{kind}\s+{name}\s*;"
        text = re.sub(declaration, given if name in constants else f"extern {kind} {name};", text)
    return text


def rewrite_threadgroup_variables(text: str, declare: Callable[[int, str, str, str], str]) -> str:
    """Replace each `threadgroup T name[N];` of a function body.

    Args:
        text: Prepared source.
        declare: Gives the replacement from a number unique in the text, the type, the name and
            the dimensions such as `"[8][33]"`.

    Raises:
        EmulatorError: A declaration has a form that is not understood. Left alone it would make
            a variable of each thread.
    """
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        kind, declared = " ".join(match.group("type").split()), []
        for variable in re.split(r",(?![^\[]*\])", match.group("variables")):
            name, bracket, dimensions = variable.strip().partition("[")
            dimensions = bracket + " ".join(dimensions.split())
            declared.append(declare(count, kind, name.strip(), dimensions))
            count += 1
        newlines = match.group(0)[len(match.group("before")) :].count("\n")
        return match.group("before") + " ".join(declared) + "\n" * newlines

    previous = None
    while previous != text:  # neighbours share their delimiter: a pass takes every other
        previous, text = text, _THREADGROUP_VARIABLE.sub(replace, text)
    missed = _MISSED_VARIABLE.search(text)
    if missed is not None:
        raise EmulatorError(f"threadgroup variable not understood: {' '.join(missed[0].split())!r}")
    return text


def arena_variable(number: int, kind: str, name: str, dimensions: str) -> str:
    """A threadgroup variable as a reference into the runtime's arena."""
    t = f"emu_variable_{number}"
    return (
        f"typedef {kind} {t}{dimensions}; {t}& {name} = "
        f'*({t}*)emu_threadgroup_variable({number}, sizeof({t}), "{name}");'
    )
