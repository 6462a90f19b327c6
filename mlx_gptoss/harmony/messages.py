"""What a harmony conversation is made of: messages, and what a system or developer message holds.

Plain frozen data. A message says who wrote it, on which channel, to whom, and what; if the model
wrote it, also the exact tokens it was sampled as, because rendering the same message again gives
other tokens (the recipient moves in the header) and would throw away the K,V cache behind it.

The date is a field of the system content, so it is fixed when a conversation begins: a date that
changed at midnight would change the first tokens of every prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """Who wrote a message."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Channel(StrEnum):
    """What an assistant message is for."""

    ANALYSIS = "analysis"
    """Reasoning, not meant for the user."""
    COMMENTARY = "commentary"
    """Calls of function tools, and what the model says to the user before calling."""
    FINAL = "final"
    """The answer."""


class ReasoningEffort(StrEnum):
    """How long the model reasons before it answers."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


CONSTRAIN_JSON = "<|constrain|>json"
"""Content type of a call's arguments; `<|constrain|>` in front is rendered as the control token."""


@dataclass(frozen=True, kw_only=True)
class ToolDescription:
    """One function that the model may call.

    Attributes:
        name: a TypeScript identifier where it is rendered; a `Toolbox` takes any name.
        description: told to the model as comment lines.
        parameters: JSON schema of the arguments; None for a function without arguments.
        strict: calls are held to that schema while they are sampled; needs the extra `structured`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class ToolNamespace:
    """A named group of functions; one without functions takes plain text, like `python`."""

    name: str
    description: str | None = None
    tools: tuple[ToolDescription, ...] = ()


def function_tools(*tools: ToolDescription) -> ToolNamespace:
    """Return the namespace of an app's own functions, called as `functions.NAME`."""
    return ToolNamespace(name="functions", tools=tools)


@dataclass(frozen=True, kw_only=True)
class SystemContent:
    """What the system message states: identity, dates, effort, built-in tools, channels.

    An app's own prompt does not belong here: it is `DeveloperContent.instructions`.

    Attributes:
        date: ISO date on which the conversation began, or None for no such line.
        tools: built-in namespaces, see `mlx_gptoss.harmony.builtin_tools`.
        channels: names of the valid channels; empty for no such section.
    """

    identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    date: str | None = None
    effort: ReasoningEffort | None = ReasoningEffort.MEDIUM
    tools: tuple[ToolNamespace, ...] = ()
    channels: tuple[str, ...] = tuple(Channel)


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """A named JSON schema that answers must follow."""

    name: str
    schema: Mapping[str, Any]
    description: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeveloperContent:
    """What the developer message states: the app's instructions, its tools, its answer formats."""

    instructions: str | None = None
    tools: tuple[ToolNamespace, ...] = ()
    response_formats: tuple[ResponseFormat, ...] = ()


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: who wrote it.
        content: its text; structured content in system and developer messages only.
        name: of the author. Required in a tool's message: `functions.NAME`.
        channel: a `Channel` or another name; None in user, system and developer messages.
        recipient: the tool it calls, `assistant` in a tool's message, or None for everyone.
        content_type: of the text: `code`, `json`, or `CONSTRAIN_JSON`.
        sampled: the tokens it was sampled as, from `<|start|>` to its end token; None if no model
            wrote it or if the parser had to repair it. Not compared.
    """

    role: Role
    content: str | SystemContent | DeveloperContent
    name: str | None = field(default=None, kw_only=True)
    channel: str | None = field(default=None, kw_only=True)
    recipient: str | None = field(default=None, kw_only=True)
    content_type: str | None = field(default=None, kw_only=True)
    sampled: tuple[int, ...] | None = field(default=None, kw_only=True, compare=False, repr=False)


def system(content: SystemContent) -> Message:
    """Return the system message, the first of a conversation."""
    return Message(Role.SYSTEM, content)


def developer(content: DeveloperContent) -> Message:
    """Return the developer message, the second of a conversation."""
    return Message(Role.DEVELOPER, content)


def user(text: str) -> Message:
    """Return a message of the user."""
    return Message(Role.USER, text)


def assistant(text: str, *, channel: Channel = Channel.FINAL) -> Message:
    """Return a message of the model to everyone."""
    return Message(Role.ASSISTANT, text, channel=channel)


def tool_call(recipient: str, arguments: str) -> Message:
    """Return a call of the model with JSON arguments; `recipient` is `functions.NAME`."""
    return Message(
        Role.ASSISTANT,
        arguments,
        channel=Channel.COMMENTARY,
        recipient=recipient,
        content_type=CONSTRAIN_JSON,
    )


def tool_result(author: str, text: str) -> Message:
    """Return what a tool answered; `author` is the recipient of the call: `functions.NAME`."""
    return Message(
        Role.TOOL, text, name=author, channel=Channel.COMMENTARY, recipient=Role.ASSISTANT
    )
