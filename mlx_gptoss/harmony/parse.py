"""Sampled tokens as typed events, while they are sampled.

`HarmonyParser` is total: it takes any sequence of token ids, never raises, shows no control token
as text, and drops nothing without a `Repair` that says so. Nothing depends on how the tokens are
grouped, because they are fed one by one.

What a message is for follows from its header:

    a declared recipient, on any channel   a call of that tool
    analysis, or another's role            reasoning
    commentary                             a preamble, told to the user; reasoning if the header
                                           holds junk, because the seen ones were that
    final                                  the answer
    no known channel                       held back until it ends: the answer if the turn ends
                                           with it, reasoning if more follows

Only declared recipients count, so a model that calls tools it was never offered, or a content
type that looks like a recipient, cannot turn an answer into a call: such a message is what its
channel says.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_gptoss.harmony.events import (
    Event,
    FinishReason,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    Repair,
    RepairKind,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallStarted,
    TurnDone,
)
from mlx_gptoss.harmony.frames import Framer
from mlx_gptoss.harmony.header import Header
from mlx_gptoss.harmony.messages import Channel, Message, Role
from mlx_gptoss.vocabulary import Special, load_vocabulary

_DELTA = {
    Channel.ANALYSIS: ReasoningDelta,
    Channel.COMMENTARY: PreambleDelta,
    Channel.FINAL: TextDelta,
}

_DeltaType = type[ReasoningDelta] | type[PreambleDelta] | type[TextDelta] | type[ToolCallDelta]


class HarmonyParser:
    """Turns the tokens sampled after `<|start|>assistant` into events.

    Args:
        recipients: the offered tools: harmony name (`functions.get_weather`, `python`) to the
            name that events give; `Toolbox.recipients`.
    """

    def __init__(self, recipients: Mapping[str, str] | None = None):
        self._turn = _Turn(dict(recipients or {}))
        self._framer = Framer(self._turn, role=Role.ASSISTANT)

    def feed(self, token: int) -> list[Event]:
        """Take the next sampled token and return what it tells, often nothing or one delta."""
        self._framer.feed(token)
        self._turn.position += 1
        return self._turn.take_events()

    def finish(self) -> list[Event]:
        """Say that no token follows, and return the rest.

        An open message is done as far as it goes, but an unfinished call is never `ToolCallDone`.
        If the turn did not end by itself, it ends with `FinishReason.LENGTH`.
        """
        self._framer.finish()
        if not self._turn.over:
            self._turn.events.append(TurnDone(FinishReason.LENGTH))
            self._turn.over = True
        return self._turn.take_events()


class _Turn:
    """Gives the messages of a stream their meaning; the sink of the framer."""

    def __init__(self, recipients: Mapping[str, str]):
        self._recipients = recipients
        self.events: list[Event] = []
        self.position = 0
        self.over = False
        self._called = False
        self._repaired = False
        self._prompted = True  # the prompt already holds this message's `<|start|>assistant`
        self._begin(Message(Role.ASSISTANT, ""), None)

    def take_events(self) -> list[Event]:
        if not self.events:
            return []
        events, self.events = self.events, []
        return events

    def on_repair(self, kind: RepairKind, detail: str) -> None:
        self.over = False
        self._repaired = True
        self.events.append(Repair(kind, detail, self.position))

    def on_header(self, header: Header) -> None:
        self.over = False
        message = self._understood(header)
        if message.recipient is not None:
            self._begin(message, ToolCallDelta)
            self.events.append(ToolCallStarted(self._recipients[message.recipient]))
        elif message.channel is None:
            self._begin(message, None)
        else:
            self._begin(message, _DELTA[Channel(message.channel)])

    def on_text(self, text: str) -> None:
        self._texts.append(text)
        if self._delta is not None:
            self.events.append(self._delta(text))

    def on_end(self, end: int | None, tokens: tuple[int, ...]) -> None:
        message = replace(self._message, content="".join(self._texts))
        if message.recipient is not None:
            message = self._called_back(message, end)
        elif message.channel is None:
            message = self._released(message, end)
        elif end == Special.CALL:
            self.on_repair(RepairKind.NOT_A_CALL, "")
        if not self._repaired:
            message = replace(message, sampled=self._sampled(message, end, tokens))
        self.events.append(MessageDone(message, tokens))
        self._repaired, self._prompted = False, False
        if message.recipient is not None and end == Special.END:
            self.on_stop(end)

    def on_stop(self, stop: int) -> None:
        if not self.over:
            reason = FinishReason.TOOL_CALLS if self._called else FinishReason.STOP
            self.events.append(TurnDone(reason))
        self.over, self._called, self._repaired = True, False, False

    def _begin(self, message: Message, delta: _DeltaType | None) -> None:
        self._message, self._delta = message, delta
        self._texts: list[str] = []

    def _understood(self, header: Header) -> Message:
        """Return the message that a header begins, without a recipient that was not offered."""
        foreign = header.role not in (None, Role.ASSISTANT)
        if foreign:
            self.on_repair(RepairKind.FOREIGN_ROLE, f"{header.role} {header.name or ''}".strip())
        recipient, channel = header.recipient, header.channel
        if recipient is not None and (foreign or recipient not in self._recipients):
            self.on_repair(RepairKind.UNDECLARED_RECIPIENT, recipient)
            recipient = None
        if foreign:
            channel = Channel.ANALYSIS
        elif recipient is not None:
            channel = channel or Channel.COMMENTARY
        elif channel is None:
            self.on_repair(RepairKind.NO_CHANNEL, "")
        elif channel == Channel.COMMENTARY and header.text:
            channel = Channel.ANALYSIS
        return Message(
            Role.ASSISTANT,
            "",
            name=None if foreign else header.name,
            channel=channel,
            recipient=recipient,
            content_type=header.content_type,
        )

    def _released(self, message: Message, end: int | None) -> Message:
        """Decide about a message without a channel, whose text was held back."""
        more_follows = end in (Special.END, Special.START)
        channel = Channel.ANALYSIS if more_follows else Channel.FINAL
        if message.content:
            self.events.append(_DELTA[channel](str(message.content)))
        return replace(message, channel=channel)

    def _called_back(self, message: Message, end: int | None) -> Message:
        """Complete a call, unless it was cut."""
        if end is None:
            return message
        if end != Special.CALL:
            self.on_repair(RepairKind.CALL_ENDED, str(end))
        recipient, arguments = str(message.recipient), str(message.content)
        if "." in recipient:  # a function of a namespace; a bare one, like python, takes plain text
            arguments = self._json_arguments(arguments)
        self._called = True
        self.events.append(ToolCallDone(self._recipients[recipient], recipient, arguments))
        return replace(message, content=arguments)

    def _json_arguments(self, arguments: str) -> str:
        """Return a function's arguments as a JSON object, if they can be read as one."""
        parsed = _lenient_json(arguments)
        if isinstance(parsed, list) and len(parsed) == 1 and isinstance(parsed[0], dict):
            self.on_repair(RepairKind.ARGUMENTS_UNWRAPPED, "")
            arguments, parsed = arguments.strip()[1:-1].strip(), parsed[0]
        if not isinstance(parsed, dict):
            self.on_repair(RepairKind.ARGUMENTS_NOT_JSON, "")
        elif not _is_strict_json(arguments):
            self.on_repair(RepairKind.ARGUMENTS_ESCAPED, "")
            return json.dumps(parsed, ensure_ascii=False)
        return arguments

    def _sampled(
        self, message: Message, end: int | None, tokens: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return a well-formed message's tokens with the beginning that the prompt held."""
        prompt = (int(Special.START), *load_vocabulary().encode(Role.ASSISTANT))
        if end is None:
            tokens += (int(Special.END if message.recipient is None else Special.CALL),)
        return prompt + tokens if self._prompted else tokens


def _lenient_json(text: str) -> Any:
    """Return the value of JSON whose strings may hold raw control characters, or None."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _is_strict_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
