"""What apps give as messages, as harmony messages: a text, our own messages, or chat dictionaries.

Chat dictionaries are those of OpenAI's Chat Completions: `system` and `developer` are the app's
instructions, assistant messages may hold `tool_calls` and their `reasoning`, tool messages answer
a `tool_call_id`. They may stand beside our messages in one list, so that an app can append
`Reply.messages`, which know the tokens they were sampled as.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony import (
    Channel,
    DeveloperContent,
    Message,
    ReasoningEffort,
    ResponseFormat,
    Role,
    SystemContent,
    Toolbox,
    ToolDescription,
    ToolNamespace,
    assistant,
    developer,
    system,
    tool_call,
    tool_result,
    user,
)
from mlx_gptoss.rules import ToolChoice, TurnRules, turn_rules

ChatDict = Mapping[str, Any]
Messages = str | Sequence[Message | ChatDict]
Tools = Iterable[ToolDescription | ToolNamespace | ChatDict]
Answers = ResponseFormat | ChatDict


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation that the model is to continue.

    Attributes:
        messages: From the system message on.
        recipients: Tools that may be called: harmony name to the app's.
        head: How many messages come before the first of the user: instructions and tools.
        rules: How the turn may end; None: as it likes.
    """

    messages: tuple[Message, ...]
    recipients: Mapping[str, str]
    head: int
    rules: TurnRules | None


def read_conversation(
    messages: Messages,
    *,
    date: str,
    instructions: str | None = None,
    reasoning: ReasoningEffort | str | None = None,
    tools: Tools = (),
    tool_choice: ToolChoice = "auto",
    response_format: Answers | None = None,
) -> Conversation:
    """Return the conversation of what an app gave.

    Args:
        messages: A question, or the messages so far.
        date: ISO date to tell the model, unless `messages` begin with a system message of ours.
        instructions: The app's own prompt.
        reasoning: "low", "medium" (default) or "high".
        tools: Offered: descriptions, built-in namespaces, or Chat Completions dictionaries.
        tool_choice: See `turn_rules`.
        response_format: A schema for the answer, or the `response_format` of Chat Completions.

    Raises:
        HarmonyError: Something cannot be understood; says what and where.
    """
    given = [user(messages)] if isinstance(messages, str) else list(messages)
    answers = _answers(response_format)
    if given and isinstance(given[0], Message) and given[0].role == Role.SYSTEM:
        if instructions is not None or reasoning is not None or list(tools) or answers:
            raise HarmonyError(
                "messages[0]: a system message of your own says everything; expected no "
                "instructions, reasoning, tools or response_format beside it"
            )
        return _own(given, tool_choice=tool_choice)
    toolbox = _toolbox(tools)
    texts, rest = _Reader(toolbox).read(given)
    if not rest:
        raise HarmonyError("messages: expected one of the user at least, got none")
    content = SystemContent(effort=_effort(reasoning), date=date, tools=toolbox.builtin)
    head = [system(content)]
    told = "\n\n".join([*([] if instructions is None else [instructions]), *texts])
    if told or toolbox.functions or answers:
        head.append(
            developer(
                DeveloperContent(
                    instructions=told or None,
                    tools=toolbox.functions,
                    response_formats=(answers,) if answers else (),
                )
            )
        )
    return Conversation(
        messages=(*head, *rest),
        recipients=toolbox.recipients,
        head=len(head),
        rules=turn_rules(toolbox, answers=answers, tool_choice=tool_choice),
    )


def _own(given: Sequence[Message | ChatDict], *, tool_choice: ToolChoice) -> Conversation:
    """A conversation that begins with our own system message."""
    functions: list[ToolDescription] = []
    builtin: list[ToolNamespace] = []
    answers = None
    head = 0
    for message in given:
        content = message.content if isinstance(message, Message) else None
        if not isinstance(content, SystemContent | DeveloperContent):
            break
        head += 1
        for namespace in content.tools:
            functions += namespace.tools if namespace.name == "functions" else ()
            builtin += [namespace] if namespace.name != "functions" else ()
        if isinstance(content, DeveloperContent) and content.response_formats:
            answers = content.response_formats[0]
    toolbox = Toolbox(functions, builtin=builtin)
    texts, rest = _Reader(toolbox).read(given[head:])
    if texts or not rest:
        raise HarmonyError(
            "messages: expected a user's after your own system message, got "
            f"{'instructions' if texts else 'none'}; put them into DeveloperContent"
        )
    first = cast("Sequence[Message]", given[:head])
    return Conversation(
        messages=(*first, *rest),
        recipients=toolbox.recipients,
        head=head,
        rules=turn_rules(toolbox, answers=answers, tool_choice=tool_choice),
    )


def _effort(reasoning: ReasoningEffort | str | None) -> ReasoningEffort:
    try:
        return ReasoningEffort.MEDIUM if reasoning is None else ReasoningEffort(reasoning)
    except ValueError:
        expected = ", ".join(ReasoningEffort)
        raise HarmonyError(f"reasoning: expected one of {expected}; got {reasoning!r}") from None


def _toolbox(tools: Tools) -> Toolbox:
    functions, builtin = [], []
    for place, tool in enumerate(tools):
        if isinstance(tool, ToolNamespace):
            builtin.append(tool)
        elif isinstance(tool, ToolDescription):
            functions.append(tool)
        else:
            functions.append(_description(tool, f"tools[{place}]"))
    return Toolbox(functions, builtin=builtin)


def _description(tool: ChatDict, where: str) -> ToolDescription:
    function = tool.get("function") if tool.get("type", "function") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise HarmonyError(
            f'{where}: expected {{"type": "function", "function": {{"name": ...}}}}, got {tool!r}'
        )
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise HarmonyError(f"{where}.function.parameters: expected a schema, got {parameters!r}")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise HarmonyError(f"{where}.function.strict: expected true or false, got {strict!r}")
    return ToolDescription(
        name=function["name"],
        description=function.get("description") or "",
        parameters=parameters,
        strict=bool(strict),
    )


def _answers(given: Answers | None) -> ResponseFormat | None:
    if given is None or isinstance(given, ResponseFormat):
        return given
    schema = given.get("json_schema")
    match given.get("type"):
        case "text":
            return None
        case "json_schema" if isinstance(schema, Mapping) and isinstance(
            schema.get("schema"), Mapping
        ):
            name, description = schema.get("name", "answer"), schema.get("description")
            return ResponseFormat(name=name, schema=schema["schema"], description=description)
        case _:
            raise HarmonyError(
                'response_format: expected {"type": "text"} or {"type": "json_schema", '
                f'"json_schema": {{"name": ..., "schema": {{...}}}}}}, got {dict(given)!r}'
            )


class _Reader:
    """Reads chat dictionaries; knows which call each id belongs to."""

    def __init__(self, toolbox: Toolbox):
        self._toolbox = toolbox
        self._called: dict[str, str] = {}  # id of a call to the app's name of the tool

    def read(self, given: Iterable[Message | ChatDict]) -> tuple[list[str], list[Message]]:
        """The texts of instructions, and the other messages."""
        texts: list[str] = []
        messages: list[Message] = []
        for place, message in enumerate(given):
            if isinstance(message, Message):
                messages.append(message)
                continue
            where, role = f"messages[{place}]", message.get("role")
            if role in ("system", "developer"):
                texts.append(_text(message, where))
            elif role == "user":
                messages.append(user(_text(message, where)))
            elif role == "assistant":
                messages += self._assistant(message, where)
            elif role == "tool":
                messages.append(self._tool(message, where))
            else:
                raise HarmonyError(
                    f"{where}.role: expected system, developer, user, assistant or tool, got "
                    f"{role!r}"
                )
        return texts, messages

    def _assistant(self, message: ChatDict, where: str) -> list[Message]:
        calls = message.get("tool_calls") or ()
        read = []
        if thought := message.get("reasoning") or message.get("reasoning_content"):
            read.append(assistant(str(thought), channel=Channel.ANALYSIS))
        if message.get("content") is not None:
            channel = Channel.COMMENTARY if calls else Channel.FINAL
            read.append(assistant(_text(message, where), channel=channel))
        for number, call in enumerate(calls):
            at = f"{where}.tool_calls[{number}]"
            function = call.get("function", {})
            if not isinstance(function.get("name"), str):
                raise HarmonyError(f"{at}.function.name: expected the name of a tool, got {call!r}")
            arguments = function.get("arguments", "{}")
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            read.append(tool_call(self._toolbox.recipient(function["name"]), arguments))
            self._called[str(call.get("id"))] = function["name"]
        return read

    def _tool(self, message: ChatDict, where: str) -> Message:
        call = str(message.get("tool_call_id"))
        name = message.get("name") or self._called.get(call)
        if name is None:
            raise HarmonyError(
                f"{where}.tool_call_id: expected the id of a call before it, got {call!r}; "
                "give one, or the tool's name"
            )
        return tool_result(self._toolbox.recipient(name), _text(message, where))


def _text(message: ChatDict, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content if isinstance(content, Sequence) else [content]):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise HarmonyError(
                f"{where}.content[{number}]: expected text, got {part!r}; gpt-oss reads text only"
            )
        texts.append(part["text"])
    return "".join(texts)
