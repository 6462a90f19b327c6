"""Names of tools that the model can write, and the way back.

A function is told to the model as a TypeScript declaration and called as `functions.NAME`, so its
name must be an identifier. Apps and MCP servers use others (`get-weather`, `Web Search`), which
break the header if they are rendered as they are. `identifiers` maps names to identifiers one to
one; `recipients` gives the parser the way back, and with it the list of tools that exist.
"""

import re
from collections.abc import Iterable, Mapping

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony.messages import ToolNamespace

_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$]*", re.ASCII)
_OTHER = re.compile(r"[^\w$]", re.ASCII)


def identifiers(names: Iterable[str]) -> dict[str, str]:
    """Return an identifier for each name, all different; a name that is one stays as it is.

    Other characters become `_`, and a number is added where two would be the same, so the result
    depends only on the names and their order.

    Raises:
        HarmonyError: a name is empty or comes twice.
    """
    names = list(names)
    for place, name in enumerate(names):
        if not name or name in names[:place]:
            raise HarmonyError(
                f"tools[{place}].name: expected a name of its own, got {name!r}"
                f"{' again' if name else ''}; give every tool another name"
            )
    chosen = {name: name for name in names if _IDENTIFIER.fullmatch(name)}
    taken = set(chosen.values())
    for name in names:
        if name not in chosen:
            chosen[name] = _free(_OTHER.sub("_", name), taken)
            taken.add(chosen[name])
    return {name: chosen[name] for name in names}


def recipients(
    namespaces: Iterable[ToolNamespace], functions: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return what a `HarmonyParser` takes: every recipient of these namespaces and its name.

    Args:
        namespaces: the tools of the conversation, built-in ones included.
        functions: `identifiers` of the app's functions, if they were renamed.

    Returns:
        Harmony name to the app's name: `functions.get_weather` to `get-weather`,
        `browser.search` and `python` to themselves.
    """
    originals = {identifier: name for name, identifier in (functions or {}).items()}
    found = {}
    for namespace in namespaces:
        if not namespace.tools:
            found[namespace.name] = namespace.name
        for tool in namespace.tools:
            recipient = f"{namespace.name}.{tool.name}"
            own = namespace.name == "functions"
            found[recipient] = originals.get(tool.name, tool.name) if own else recipient
    return found


def _free(name: str, taken: set[str]) -> str:
    if name[0].isdigit():
        name = f"_{name}"
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
