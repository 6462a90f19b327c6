"""openai-harmony's Python interface on top of ours, to run its own test suite against our code.

It exists for `tests/harmony_conformance.md` only and translates; all rendering and parsing is
`mlx_gptoss.harmony`. What upstream does and we do not is marked with "upstream:".
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from mlx_gptoss import harmony as ours
from mlx_gptoss.harmony.events import RepairKind
from mlx_gptoss.harmony.frames import Framer
from mlx_gptoss.harmony.header import Header
from mlx_gptoss.vocabulary import N_TEXT, load_vocabulary


class HarmonyError(RuntimeError):
    pass


class HarmonyEncodingName(StrEnum):
    HARMONY_GPT_OSS = "HarmonyGptOss"


Role = ours.Role
ReasoningEffort = ours.ReasoningEffort


class Author(BaseModel):
    role: Role
    name: str | None = None

    @classmethod
    def new(cls, role: Role, name: str) -> Author:
        return cls(role=role, name=name)


class ToolDescription(BaseModel):
    name: str
    description: str
    parameters: dict[str, Any] | None = None

    @classmethod
    def new(cls, name: str, description: str, parameters: Any = None) -> ToolDescription:
        return cls(name=name, description=description, parameters=parameters)


class SystemContent(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    ours: ours.SystemContent

    @classmethod
    def new(cls) -> SystemContent:
        return cls(ours=ours.SystemContent())

    def _with(self, **changes: Any) -> SystemContent:
        return SystemContent(ours=replace(self.ours, **changes))

    def with_model_identity(self, identity: str) -> SystemContent:
        return self._with(identity=identity)

    def with_reasoning_effort(self, effort: ReasoningEffort) -> SystemContent:
        return self._with(effort=effort)

    def with_conversation_start_date(self, date: str) -> SystemContent:
        return self._with(date=date)

    def with_knowledge_cutoff(self, cutoff: str) -> SystemContent:
        return self._with(knowledge_cutoff=cutoff)

    def with_required_channels(self, channels: list[str]) -> SystemContent:
        return self._with(channels=tuple(channels))

    def with_browser_tool(self) -> SystemContent:
        return self._with(tools=(*self.ours.tools, ours.BROWSER))

    def with_python_tool(self) -> SystemContent:
        return self._with(tools=(*self.ours.tools, ours.PYTHON))


class DeveloperContent(BaseModel):
    instructions: str | None = None
    functions: list[ToolDescription] = []

    @classmethod
    def new(cls) -> DeveloperContent:
        return cls()

    def with_instructions(self, instructions: str) -> DeveloperContent:
        return self.model_copy(update={"instructions": instructions})

    def with_function_tools(self, tools: list[ToolDescription]) -> DeveloperContent:
        return self.model_copy(update={"functions": tools})

    def to_ours(self) -> ours.DeveloperContent:
        tools = (
            ours.ToolDescription(name=t.name, description=t.description, parameters=t.parameters)
            for t in self.functions
        )
        namespaces = (ours.function_tools(*tools),) if self.functions else ()
        return ours.DeveloperContent(instructions=self.instructions, tools=namespaces)


class Message(BaseModel):
    author: Author
    content: str | SystemContent | DeveloperContent
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    @classmethod
    def from_role_and_content(cls, role: Role, content: Any) -> Message:
        return cls(author=Author(role=role), content=content)

    @classmethod
    def from_author_and_content(cls, author: Author, content: Any) -> Message:
        return cls(author=author, content=content)

    def with_channel(self, channel: str) -> Message:
        return self.model_copy(update={"channel": channel})

    def with_recipient(self, recipient: str) -> Message:
        return self.model_copy(update={"recipient": recipient})

    def with_content_type(self, content_type: str) -> Message:
        return self.model_copy(update={"content_type": content_type})

    def to_ours(self) -> ours.Message:
        content: Any = self.content
        if isinstance(content, SystemContent):
            content = content.ours
        elif isinstance(content, DeveloperContent):
            content = content.to_ours()
        return ours.Message(
            self.author.role,
            content,
            name=self.author.name,
            channel=self.channel,
            recipient=self.recipient,
            content_type=self.content_type,
        )


class Conversation(BaseModel):
    messages: list[Message]

    @classmethod
    def from_messages(cls, messages: list[Message]) -> Conversation:
        return cls(messages=messages)

    def to_ours(self) -> list[ours.Message]:
        return [message.to_ours() for message in self.messages]


class RenderConversationConfig(BaseModel):
    auto_drop_analysis: bool = True


def _options(config: RenderConversationConfig | None) -> ours.RenderOptions:
    drop = config is None or config.auto_drop_analysis
    return ours.RenderOptions(old_analysis=ours.OldAnalysis.DROP if drop else ours.OldAnalysis.KEEP)


class HarmonyEncoding:
    def encode(
        self, text: str, *, allowed_special: Any = (), disallowed_special: Any = "all"
    ) -> list[int]:
        if allowed_special != "all":
            allowed_special = set(allowed_special)
        try:
            return load_vocabulary().encoding.encode(
                text, allowed_special=allowed_special, disallowed_special=disallowed_special
            )
        except ValueError as error:
            raise HarmonyError(str(error)) from error

    def decode_bytes(self, tokens: list[int]) -> bytes:
        if tokens == [201_088]:  # upstream: one id more than the models have rows
            return b"<|reserved_201088|>"
        try:
            return load_vocabulary().decode_bytes(tokens)
        except ValueError as error:
            raise HarmonyError(f"Invalid token for decoding: {tokens[0]}") from error

    def decode_utf8(self, tokens: list[int]) -> str:
        try:
            return self.decode_bytes(tokens).decode()
        except UnicodeDecodeError as error:
            raise HarmonyError(f"Invalid utf-8: {error}") from error

    def decode(self, tokens: list[int]) -> str:
        return load_vocabulary().decode(tokens)

    def is_special_token(self, token: int) -> bool:
        return token >= N_TEXT

    def render(self, message: Message) -> list[int]:
        return ours.render_message(message.to_ours())

    def render_conversation(
        self, conversation: Conversation, config: RenderConversationConfig | None = None
    ) -> list[int]:
        return ours.render_conversation(conversation.to_ours(), options=_options(config))

    def render_conversation_for_training(self, conversation: Conversation) -> list[int]:
        return ours.render_conversation_for_training(conversation.to_ours())

    def render_conversation_for_completion(
        self,
        conversation: Conversation,
        role: Role,
        config: RenderConversationConfig | None = None,
    ) -> list[int]:
        return ours.render_conversation_for_completion(
            conversation.to_ours(), role=role, options=_options(config)
        )

    def parse_messages_from_completion_tokens(
        self, tokens: list[int], role: Role | None = None
    ) -> list[Message]:
        parser = StreamableParser(self, role)
        for token in tokens:
            parser.process(token)
        parser.process_eos()
        return parser.messages


def load_harmony_encoding(name: HarmonyEncodingName) -> HarmonyEncoding:
    return HarmonyEncoding()


class StreamableParser:
    """A sink of our framer; upstream: in strict mode, a header without its end is an error."""

    def __init__(self, encoding: HarmonyEncoding, role: Role | None, strict: bool = True):
        self._framer = Framer(self, role=role)
        self._strict = strict
        self._texts: list[str] = []
        self.messages: list[Message] = []
        self.last_content_delta: str | None = None

    def process(self, token: int) -> None:
        self.last_content_delta = None
        self._framer.feed(token)

    def process_eos(self) -> None:
        self._framer.finish()

    @property
    def current_content(self) -> str:
        return "".join(self._texts)

    def on_header(self, header: Header) -> None:
        self._header, self._texts = header, []

    def on_text(self, text: str) -> None:
        self._texts.append(text)
        self.last_content_delta = text

    def on_end(self, end: int | None, tokens: tuple[int, ...]) -> None:
        header = self._header
        role = header.role or Role.ASSISTANT
        self.messages.append(
            Message(
                author=Author(role=role, name=header.name),
                content="".join(self._texts),
                channel=header.channel,
                recipient=header.recipient,
                content_type=header.content_type,
            )
        )

    def on_stop(self, stop: int) -> None:
        pass

    def on_repair(self, kind: RepairKind, detail: str) -> None:
        if self._strict and kind is RepairKind.NO_MESSAGE:
            raise HarmonyError(f"unexpected tokens remaining in message header: {detail}")
