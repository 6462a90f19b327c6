"""Events as lines that people can read and compare."""

from collections.abc import Iterable

from mlx_gptoss.harmony import (
    Event,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    Repair,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallStarted,
    TurnDone,
)

_WORDS = {
    ReasoningDelta: "reasoning",
    PreambleDelta: "preamble",
    TextDelta: "text",
    ToolCallDelta: "arguments",
}


def transcript(events: Iterable[Event]) -> list[str]:
    """One line an event, `MessageDone` left out, deltas of a message joined."""
    lines: list[str] = []
    open_word = None
    for event in events:
        word = _WORDS.get(type(event))
        if word and word == open_word:
            lines[-1] += event.text  # pyright: ignore
        elif word:
            lines.append(f"{word}: {event.text}")  # pyright: ignore
        elif not isinstance(event, MessageDone):
            lines.append(_line(event))
        open_word = word
    return lines


def _line(event: Event) -> str:
    match event:
        case ToolCallStarted():
            return f"call of {event.name}"
        case ToolCallDone():
            return f"call of {event.name} done: {event.arguments}"
        case Repair():
            return f"repair: {event.kind} {event.detail}".rstrip()
        case TurnDone():
            return f"turn: {event.reason}"
    raise AssertionError(event)
