"""How a turn may end: what an app asks of its answer and its calls beyond what harmony asks.

Rules are data. `structured` turns them into a grammar; a turn without any is decoded freely.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony import ResponseFormat, Toolbox, ToolDescription

ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]
"""As in OpenAI's API; a named tool is `{"type": "function", "function": {"name": ...}}`."""


@dataclass(frozen=True, kw_only=True)
class TurnRules:
    """How a turn may end.

    Attributes:
        answers: What an answer must follow; None: any text.
        calls: Tools that may be called, by harmony name: the description of a strict one, None
            for the others, whose arguments are any JSON object.
        must_call: The turn ends in a call, not in an answer.
    """

    answers: ResponseFormat | None
    calls: Mapping[str, ToolDescription | None]
    must_call: bool


def turn_rules(
    toolbox: Toolbox, *, answers: ResponseFormat | None, tool_choice: ToolChoice
) -> TurnRules | None:
    """Return the rules of a turn; None if it may end as it likes.

    Args:
        toolbox: The tools offered.
        answers: What an answer must follow.
        tool_choice: "auto": an answer or a call; "none": an answer; "required": a call; or a tool
            by the app's name: a call of it.

    Raises:
        HarmonyError: No such choice, or no such tool.
    """
    calls = {recipient: toolbox.strict.get(recipient) for recipient in toolbox.recipients}
    if tool_choice == "auto":
        if answers is None and not toolbox.strict:
            return None
        return TurnRules(answers=answers, calls=calls, must_call=False)
    if tool_choice == "none":
        if answers is None and not calls:
            return None
        return TurnRules(answers=answers, calls={}, must_call=False)
    if tool_choice != "required":
        recipient = toolbox.recipient(_named(tool_choice))
        calls = {recipient: calls[recipient]}
    if not calls:
        raise HarmonyError("tool_choice: expected tools beside 'required', got none; offer some")
    return TurnRules(answers=answers, calls=calls, must_call=True)


def _named(tool_choice: ToolChoice) -> str:
    """The tool that a choice names."""
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise HarmonyError(
            'tool_choice: expected "auto", "none", "required" or {"type": "function", "function": '
            f'{{"name": ...}}}}, got {tool_choice!r}'
        )
    return name
