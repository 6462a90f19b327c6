"""Python functions as tools: their description for the model, and their calls.

A function's name, docstring and annotations say what the model is told. What goes wrong in a call,
arguments that are not what they must be or an exception, is told to the model, which can correct
itself; it never ends the conversation.
"""

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony import ToolDescription

_JSON_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
}


def describe(function: Callable[..., Any]) -> ToolDescription:
    """Return the description of a function as a tool.

    Args:
        function: Named, with annotated parameters of type str, int, float, bool, dict, list,
            `list[T]`, `Literal` or `T | None`.

    Raises:
        HarmonyError: A parameter has another annotation or none, or cannot be passed by name.
    """
    name = function.__name__
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"{name}({parameter.name})"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise HarmonyError(f"{where}: expected a parameter with a name, got {parameter}")
        properties[parameter.name] = _schema(hints.get(parameter.name), where)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required}
    return ToolDescription(
        name=name,
        description=inspect.getdoc(function) or "",
        parameters=schema if properties else None,
    )


def call(function: Callable[..., Any], arguments: str) -> str:
    """Call a function with JSON arguments and return its answer for the model, or what failed."""
    try:
        given = json.loads(arguments or "{}")
        if not isinstance(given, dict):
            raise TypeError(f"arguments: expected a JSON object, got {arguments}")
        result = function(**given)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except (Exception, SystemExit) as error:
        return f"Error: {type(error).__name__}: {error}"


def _schema(hint: Any, where: str) -> Mapping[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    if origin in (list, dict):
        inner = {"items": _schema(arguments[0], where)} if origin is list else {}
        return {"type": _JSON_TYPES[origin], **inner}
    if origin is Literal and all(isinstance(value, str) for value in arguments):
        return {"type": "string", "enum": list(arguments)}
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        (other, *more) = (a for a in arguments if a is not type(None))
        if not more:
            return _schema(other, where)
    raise HarmonyError(
        f"{where}: expected an annotation of str, int, float, bool, list, dict, Literal of texts "
        f"or one of them | None, got {'none' if hint is None else hint}"
    )
