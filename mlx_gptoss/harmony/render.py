"""Conversations as tokens.

Every text of a conversation is encoded as ordinary text and every control token is placed as an
id, so no text can open or close a message. The default output equals openai-harmony 0.0.8's
(Apache-2.0), token for token, but for one rule: which old reasoning is dropped.

The models expect the reasoning behind an earlier answer to be gone, and the reasoning behind an
unfinished chain of tool calls to be there. openai-harmony drops only what stands before the
*first* answer, and brings all of it back once a tool was called; `without_old_analysis` follows
the rule itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony.messages import (
    Channel,
    DeveloperContent,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    ToolNamespace,
)
from mlx_gptoss.harmony.schema import resolve_schema
from mlx_gptoss.harmony.typescript import compact_json, tools_section
from mlx_gptoss.vocabulary import Special, load_vocabulary

_START, _MESSAGE, _END = int(Special.START), int(Special.MESSAGE), int(Special.END)
_CALL, _RETURN = int(Special.CALL), int(Special.RETURN)
_CHANNEL, _CONSTRAIN = int(Special.CHANNEL), int(Special.CONSTRAIN)


class OldAnalysis(Enum):
    """What happens to the reasoning behind earlier answers."""

    DROP = "drop"
    """What the models were trained with, and the cheaper."""
    KEEP = "keep"


class Schemas(StrEnum):
    """How the parameters of tools are told to the model."""

    OPENAI = "openai"
    """Exactly as openai-harmony words them; `$ref`, `anyOf`, `const` become `any`."""
    RESOLVED = "resolved"
    """The same wording, after `resolve_schema` has put in what OPENAI leaves out."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How conversations are rendered; keep it the same for a whole conversation."""

    old_analysis: OldAnalysis = OldAnalysis.DROP
    schemas: Schemas = Schemas.OPENAI


DEFAULT_OPTIONS = RenderOptions()


def render_conversation_for_completion(
    messages: Iterable[Message],
    *,
    role: Role = Role.ASSISTANT,
    options: RenderOptions = DEFAULT_OPTIONS,
) -> list[int]:
    """Return the prompt that lets `role` write the next message; it ends in `<|start|>{role}`.

    Raises:
        HarmonyError: a message cannot be rendered; see `render_message`.
    """
    tokens = render_conversation(messages, options=options)
    return [*tokens, _START, *load_vocabulary().encode(role)]


def render_conversation(
    messages: Iterable[Message], *, options: RenderOptions = DEFAULT_OPTIONS
) -> list[int]:
    """Return the tokens of a conversation's messages.

    Raises:
        HarmonyError: a message cannot be rendered; see `render_message`.
    """
    messages = list(messages)
    functions = has_function_tools(messages)
    if options.old_analysis is OldAnalysis.DROP:
        messages = without_old_analysis(messages)
    tokens: list[int] = []
    for message in messages:
        tokens += render_message(message, has_functions=functions, options=options)
    return tokens


def render_conversation_for_training(
    messages: Iterable[Message], *, options: RenderOptions = DEFAULT_OPTIONS
) -> list[int]:
    """Return the tokens of a conversation; an answer at its end ends in `<|return|>`.

    Raises:
        HarmonyError: a message cannot be rendered; see `render_message`.
    """
    messages = list(messages)
    tokens = render_conversation(messages, options=options)
    if messages and _is_answer(messages[-1]):
        tokens[-1] = _RETURN
    return tokens


def without_old_analysis(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without the reasoning that the next turn must not see.

    That is the assistant's analysis, unless addressed to a tool, before the last answer that
    stands before the last message of the user. Reasoning after that answer belongs to a turn
    that is not finished.
    """
    users = [i for i, message in enumerate(messages) if message.role == Role.USER]
    last_user = users[-1] if users else 0
    answers = [i for i in range(last_user) if _is_answer(messages[i])]
    last_answer = answers[-1] if answers else 0
    return [m for i, m in enumerate(messages) if i >= last_answer or not is_reasoning(m)]


def render_message(
    message: Message, *, has_functions: bool = False, options: RenderOptions = DEFAULT_OPTIONS
) -> list[int]:
    """Return the tokens of one message, from `<|start|>` to its end token.

    A message with the tokens it was sampled as is those tokens, with `<|end|>` for the
    `<|return|>` or `<|endoftext|>` that ended the turn.

    Args:
        message: the message.
        has_functions: whether the conversation declares function tools, which a line of the
            system message then says.
        options: how tools are told; `old_analysis` concerns whole conversations only.

    Raises:
        HarmonyError: a tool's message without a name, system content outside a system message,
            or developer content outside a developer message.
    """
    if message.sampled:
        return _as_history(message.sampled)
    encode = load_vocabulary().encode
    body = encode(_body(message, has_functions=has_functions, options=options))
    calls = message.role == Role.ASSISTANT and message.recipient is not None
    end = _CALL if calls else _END
    return [_START, *_header(message), _MESSAGE, *body, end]


def has_function_tools(messages: Iterable[Message]) -> bool:
    """Say whether a conversation declares functions of its own (not only built-in tools)."""
    return any(
        namespace.name == "functions" and namespace.tools
        for message in messages
        if isinstance(message.content, DeveloperContent)
        for namespace in message.content.tools
    )


def is_reasoning(message: Message) -> bool:
    """Say whether a message is reasoning that a later turn drops (analysis to nobody)."""
    return (
        message.role == Role.ASSISTANT
        and message.channel == Channel.ANALYSIS
        and message.recipient is None
    )


def _is_answer(message: Message) -> bool:
    return message.role == Role.ASSISTANT and message.channel == Channel.FINAL


def _as_history(sampled: tuple[int, ...]) -> list[int]:
    if sampled[-1] in (_RETURN, Special.ENDOFTEXT):
        return [*sampled[:-1], _END]
    return list(sampled)


def _header(message: Message) -> list[int]:
    encode = load_vocabulary().encode
    tokens = encode(_author(message))
    if message.recipient is not None and message.recipient != "all":
        tokens += encode(f" to={message.recipient}")
    if message.channel is not None:
        tokens += [_CHANNEL, *encode(message.channel)]
    if message.content_type is None:
        return tokens
    if message.content_type.startswith(Special.CONSTRAIN.spelling):
        rest = message.content_type.removeprefix(Special.CONSTRAIN.spelling)
        return [*tokens, *encode(" "), _CONSTRAIN, *encode(rest)]
    return tokens + encode(f" {message.content_type}")


def _author(message: Message) -> str:
    if message.role != Role.TOOL:
        return f"{message.role}:{message.name}" if message.name is not None else message.role
    if message.name is None:
        raise HarmonyError(
            "a tool's message: expected the name of the tool, got none; give "
            "Message(name='functions.NAME'), the recipient of the call"
        )
    return message.name


def _body(message: Message, *, has_functions: bool, options: RenderOptions) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    expected = Role.SYSTEM if isinstance(content, SystemContent) else Role.DEVELOPER
    if message.role != expected:
        raise HarmonyError(
            f"{type(content).__name__} in a message of role {message.role}: expected role "
            f"{expected}; give this message text"
        )
    if isinstance(content, SystemContent):
        return _system_text(content, has_functions=has_functions, options=options)
    return _developer_text(content, options=options)


def _system_text(content: SystemContent, *, has_functions: bool, options: RenderOptions) -> str:
    facts = [] if content.identity is None else [content.identity]
    if content.knowledge_cutoff is not None:
        facts.append(f"Knowledge cutoff: {content.knowledge_cutoff}")
    if content.date is not None:
        facts.append(f"Current date: {content.date}")
    sections = ["\n".join(facts)] if facts else []
    if content.effort is not None:
        sections.append(f"Reasoning: {content.effort}")
    if content.tools:
        sections.append(tools_section(_told(content.tools, options)))
    if content.channels:
        text = f"# Valid channels: {', '.join(content.channels)}. "
        text += "Channel must be included for every message."
        if has_functions:
            text += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(text)
    return "\n\n".join(sections)


def _developer_text(content: DeveloperContent, *, options: RenderOptions) -> str:
    sections = []
    if content.instructions is not None:
        sections += ["# Instructions", content.instructions]
    if content.tools:
        sections.append(tools_section(_told(content.tools, options)))
    if content.response_formats:
        sections.append("# Response Formats")
        sections += [_response_format(answer) for answer in content.response_formats]
    return "\n\n".join(sections)


def _response_format(answer: ResponseFormat) -> str:
    comment = f"// {answer.description}\n" if answer.description else ""
    return f"## {answer.name}\n\n{comment}{compact_json(answer.schema)}"


def _told(namespaces: tuple[ToolNamespace, ...], options: RenderOptions) -> list[ToolNamespace]:
    if options.schemas is Schemas.OPENAI:
        return list(namespaces)
    return [
        replace(
            namespace,
            tools=tuple(
                tool
                if tool.parameters is None
                else replace(tool, parameters=resolve_schema(tool.parameters))
                for tool in namespace.tools
            ),
        )
        for namespace in namespaces
    ]
