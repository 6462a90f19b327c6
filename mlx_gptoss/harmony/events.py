"""What `HarmonyParser` reports while a model writes, as plain frozen data.

A turn is a sequence of messages. The pieces of a message arrive as deltas, and then the whole of
it as `MessageDone`. Joined, the deltas of a message are its text, in every case. A turn ends with
`TurnDone`; stop sampling there.
"""

from dataclasses import dataclass
from enum import StrEnum

from mlx_gptoss.harmony.messages import Message


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the model's reasoning; not meant for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class PreambleDelta:
    """More text that the model tells the user before it calls a tool (commentary)."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A call of a declared tool begins; `name` is the app's name of it."""

    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More text of the arguments of the call that was started last."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDone:
    """A call is complete. One that runs out of tokens never is: nothing half-written is called.

    Attributes:
        name: the app's name of the tool.
        recipient: the name in harmony (`functions.get_weather`), the author of the tool's answer.
        arguments: a JSON object, unless a repair says otherwise; plain text for a tool without
            functions, like `python`.
    """

    name: str
    recipient: str
    arguments: str


class RepairKind(StrEnum):
    """What was wrong in the model's output, and what the parser made of it."""

    NO_START = "no_start"
    """A header without `<|start|>`: taken as the assistant's."""
    NO_ROLE = "no_role"
    """No role, or an unknown one: taken as the assistant's."""
    FOREIGN_ROLE = "foreign_role"
    """The model wrote another's message: its text counts as reasoning."""
    NO_CHANNEL = "no_channel"
    """No channel, or an unknown one: the answer if it ends the turn, reasoning otherwise."""
    MISPLACED_CHANNEL = "misplaced_channel"
    """A channel's name without `<|channel|>`: taken as the channel."""
    SEVERAL_CHANNELS = "several_channels"
    """More than one channel: the last known one counts."""
    HEADER_TEXT = "header_text"
    """Other text in a header: set aside here; on the commentary channel the rest is reasoning."""
    BARE_RECIPIENT = "bare_recipient"
    """`functions.NAME` without `to=`: taken as the recipient."""
    UNDECLARED_RECIPIENT = "undeclared_recipient"
    """A call of a tool that was not offered: its text counts as what its channel says."""
    RESTARTED_HEADER = "restarted_header"
    """`<|start|>` in a header: the header begins anew."""
    NO_MESSAGE = "no_message"
    """A header that ends without `<|message|>`: what follows the channel is the message, if it is
    any text; a header alone is set aside here."""
    NO_END = "no_end"
    """A message followed by the next header without `<|end|>`: it ends there."""
    CALL_ENDED = "call_ended"
    """A call that ends in another token than `<|call|>`: a call all the same."""
    NOT_A_CALL = "not_a_call"
    """`<|call|>` after a message to nobody: the turn ends."""
    LATE_STOP = "late_stop"
    """A stop token after the end of a message: the turn ends."""
    STRAY_TOKEN = "stray_token"
    """A control or reserved token where it means nothing: skipped."""
    ARGUMENTS_UNWRAPPED = "arguments_unwrapped"
    """Arguments that are a list holding one object: the object."""
    ARGUMENTS_ESCAPED = "arguments_escaped"
    """Arguments with raw line ends inside strings: written as `\\n`."""
    ARGUMENTS_NOT_JSON = "arguments_not_json"
    """A function's arguments that are no JSON object: passed on as they are."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Something malformed in the model's output, and where.

    Attributes:
        kind: what, and what was made of it.
        detail: the ordinary text concerned, or the id of a token; never a control token's spelling.
        position: how many tokens were fed before the one that showed it.
    """

    kind: RepairKind
    detail: str
    position: int


@dataclass(frozen=True, slots=True)
class MessageDone:
    """A message is complete.

    Attributes:
        message: what it says, after repairs; ready to be the next of the conversation.
        tokens: every token fed since the message before, in order.
    """

    message: Message
    tokens: tuple[int, ...]


class FinishReason(StrEnum):
    """Why a turn ended, in the words of OpenAI's API."""

    STOP = "stop"
    TOOL_CALLS = "tool_calls"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The turn is over: the model stopped or called a tool, or `finish` was called (LENGTH)."""

    reason: FinishReason


Event = (
    ReasoningDelta
    | PreambleDelta
    | TextDelta
    | ToolCallStarted
    | ToolCallDelta
    | ToolCallDone
    | Repair
    | MessageDone
    | TurnDone
)
