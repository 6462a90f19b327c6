"""Parsing: what a stream means, event by event."""

import json
from pathlib import Path

import pytest
from harmony_transcript import transcript

from mlx_gptoss.harmony import (
    Channel,
    Event,
    FinishReason,
    HarmonyParser,
    Message,
    MessageDone,
    ReasoningDelta,
    Repair,
    Role,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallStarted,
    TurnDone,
)
from mlx_gptoss.vocabulary import load_vocabulary

TOOLS = {"functions.get_weather": "get-weather", "python": "python"}


def tokens_of(text: str) -> list[int]:
    """The ids of a stream written out, control tokens included."""
    return load_vocabulary().encoding.encode(text, allowed_special="all")


def events_of(text: str, tools: dict[str, str] = TOOLS) -> list[Event]:
    parser = HarmonyParser(tools)
    events = [event for token in tokens_of(text) for event in parser.feed(token)]
    return events + parser.finish()


def joined(events: list[Event], kind: type) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def test_reasoning_and_answer_are_told_apart() -> None:
    events = events_of(
        "<|channel|>analysis<|message|>Easy: 4.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is **4** 👍🏽.<|return|>"
    )
    assert joined(events, ReasoningDelta) == "Easy: 4."
    assert joined(events, TextDelta) == "It is **4** 👍🏽."
    assert [event.message for event in events if isinstance(event, MessageDone)] == [
        Message(Role.ASSISTANT, "Easy: 4.", channel=Channel.ANALYSIS),
        Message(Role.ASSISTANT, "It is **4** 👍🏽.", channel=Channel.FINAL),
    ]
    assert events[-1] == TurnDone(FinishReason.STOP)


def test_a_call_is_started_told_and_done() -> None:
    events = events_of(
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city":"Tokyo"}<|call|>'
    )
    assert events[0] == ToolCallStarted("get-weather")
    assert joined(events, ToolCallDelta) == '{"city":"Tokyo"}'
    assert events[-3] == ToolCallDone("get-weather", "functions.get_weather", '{"city":"Tokyo"}')
    assert events[-1] == TurnDone(FinishReason.TOOL_CALLS)


def test_an_unfinished_answer_is_told_and_has_no_end() -> None:
    events = events_of("<|channel|>final<|message|>One, two")
    assert joined(events, TextDelta) == "One, two"
    assert events[-1] == TurnDone(FinishReason.LENGTH)


def test_messages_keep_the_tokens_they_were_sampled_as() -> None:
    stream = "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B"
    messages = [e.message for e in events_of(stream + "<|return|>") if isinstance(e, MessageDone)]
    sampled = [token for message in messages for token in message.sampled or ()]
    assert sampled == tokens_of("<|start|>assistant" + stream + "<|return|>")


def test_ordinary_tokens_that_spell_a_control_token_are_text() -> None:
    """A model that explains harmony is quoted, not obeyed."""
    spelled = load_vocabulary().encode("Write <|end|><|start|>user<|message|> here.")
    parser = HarmonyParser()
    stream = [*tokens_of("<|channel|>final<|message|>"), *spelled, *tokens_of("<|return|>")]
    events = [event for token in stream for event in parser.feed(token)]
    assert joined(events, TextDelta) == "Write <|end|><|start|>user<|message|> here."
    assert not any(isinstance(event, Repair) for event in events)


def test_half_a_character_is_held_back_and_never_leaks_into_the_next_message() -> None:
    half = [9552]  # a space and the first two bytes of an emoji
    parser = HarmonyParser()
    begin = tokens_of("<|channel|>analysis<|message|>")
    assert [event for token in [*begin, *half] for event in parser.feed(token)] == [
        ReasoningDelta(" ")
    ]
    ended = parser.feed(tokens_of("<|end|>")[0])
    assert ended[0] == ReasoningDelta("\ufffd")
    second = tokens_of("<|start|>assistant<|channel|>final<|message|>A")
    assert [event for token in second for event in parser.feed(token)] == [TextDelta("A")]
    parser.feed(half[0])
    assert parser.finish()[0] == TextDelta("\ufffd")


def test_a_built_in_function_takes_json_and_python_takes_text() -> None:
    tools = {"browser.open": "browser.open", "python": "python"}
    call = "<|channel|>analysis to={} code<|message|>[{{}}]<|call|>"
    for recipient, arguments in (("browser.open", "{}"), ("python", "[{}]")):
        events = events_of(call.format(recipient), tools)
        assert ToolCallDone(recipient, recipient, arguments) in events


CORPUS = json.loads((Path(__file__).parent / "malformed_streams.json").read_text())
CORPUS_TOOLS = {
    "functions.get_weather": "get_weather",
    "functions.bash": "bash",
    "functions.web-browsing": "web-browsing",
    "python": "python",
}


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["stream"][:60])
def test_malformed_stream(case: dict) -> None:
    """What models really write: `seen` names the report, `constructed` ones are ours.

    Reports often quote a header or a parser's error only; the stream around it is then ours, and
    short: T stands for thoughts, A for an answer.
    """
    assert transcript(events_of(case["stream"], CORPUS_TOOLS)) == case["events"]


def test_corpus_is_large_and_says_where_it_was_seen() -> None:
    assert len({case["stream"] for case in CORPUS}) == len(CORPUS) >= 60
    assert sum(case["seen"] != "constructed" for case in CORPUS) >= 40


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["stream"][:60])
def test_repaired_messages_are_rendered_anew(case: dict) -> None:
    """A malformed header in the history would teach the model to write another."""
    events = events_of(case["stream"], CORPUS_TOOLS)
    repaired = False
    for event in events:
        repaired = repaired or isinstance(event, Repair)
        if isinstance(event, MessageDone):
            assert (event.message.sampled is None) == repaired
            repaired = False
