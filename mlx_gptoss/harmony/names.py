"""Names of tools that the model can write, and the way back.

A function is told to the model as a TypeScript declaration and called as `functions.NAME`, so its
name must be an identifier. Apps and MCP servers use others (`get-weather`, `Web Search`), which
break the header if they are rendered as they are. A `Toolbox` renames them one to one, and knows
which recipients exist and what the app calls them.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony.messages import ToolDescription, ToolNamespace, function_tools

_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$]*", re.ASCII)
_OTHER = re.compile(r"[^\w$]", re.ASCII)


class Toolbox:
    """The tools offered in a conversation, under names that the model can write.

    Args:
        functions: the app's own, under any names.
        builtin: namespaces the models were trained with, see `builtin_tools`.

    Attributes:
        functions: the namespace of the app's functions for `DeveloperContent.tools`, if any.
        builtin: for `SystemContent.tools`.
        recipients: for `HarmonyParser`: `functions.get_weather` to `get-weather`,
            `browser.search` and `python` to themselves.
        strict: harmony name to the app's description, for tools whose arguments are held to it.

    Raises:
        HarmonyError: a name is empty, comes twice, or is a built-in tool's.
    """

    def __init__(
        self, functions: Iterable[ToolDescription] = (), *, builtin: Iterable[ToolNamespace] = ()
    ):
        functions, self.builtin = tuple(functions), tuple(builtin)
        chosen = identifiers(tool.name for tool in functions)
        renamed = (replace(tool, name=chosen[tool.name]) for tool in functions)
        self.functions = (function_tools(*renamed),) if functions else ()
        self.recipients = {f"functions.{new}": name for name, new in chosen.items()}
        self.strict = {f"functions.{chosen[tool.name]}": tool for tool in functions if tool.strict}
        for recipient in _builtin_recipients(self.builtin):
            if recipient in chosen:
                raise HarmonyError(
                    f"tools: expected other names than the built-in tools', got {recipient!r}; "
                    "rename this function or do not offer the built-in tool"
                )
            self.recipients[recipient] = recipient
        self._by_name = {name: recipient for recipient, name in self.recipients.items()}

    def recipient(self, name: str) -> str:
        """Return the harmony name of a tool: the recipient of its calls, the author of its answers.

        Raises:
            HarmonyError: no such tool was offered.
        """
        if name not in self._by_name:
            raise HarmonyError(
                f"tool {name!r}: expected one of {sorted(self._by_name)}; declare it in the tools"
            )
        return self._by_name[name]


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


def _builtin_recipients(namespaces: Iterable[ToolNamespace]) -> list[str]:
    found = []
    for namespace in namespaces:
        tools = [f"{namespace.name}.{tool.name}" for tool in namespace.tools]
        found += tools or [namespace.name]
    return found


def _free(name: str, taken: set[str]) -> str:
    if name[0].isdigit():
        name = f"_{name}"
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
