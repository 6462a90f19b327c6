"""20,000 random and mutated token streams: the parser takes them all and loses nothing."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_gptoss.harmony import (
    Event,
    HarmonyParser,
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
from mlx_gptoss.vocabulary import N_TEXT, Special, load_vocabulary

BATCHES, PER_BATCH = 20, 1000
TOOLS = {"functions.get_weather": "weather", "python": "python"}
DELTAS = (ReasoningDelta, PreambleDelta, TextDelta, ToolCallDelta)

# Words that no header part is made of, so that each can be followed from stream to event.
FILLERS = ["Alpha", " Bravo", "Zulu", " Yankee", "漢字", " Ünï", "👍🏽"]
HEADER_WORDS = [
    *("assistant", "user", "tool", "system", "analysis", "commentary", "final", " to=", "="),
    *("functions", "functions.get_weather", ".get", "_weather", " python", ".", " ", "\n", ":"),
    *("json", " code", "?"),
]
BROKEN_UTF8 = [9552, 132990, 28839, 222]  # a space and half an emoji, and the like
STRANGE = [-1, 199_998, 200_000, 200_013, 200_018, 201_087, 201_088, 2**40]
WELL_FORMED = [
    "<|channel|>analysis<|message|>Alpha Bravo<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Zulu 漢字👍🏽 Yankee<|return|>",
    "<|channel|>analysis<|message|> Yankee<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "Alpha<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
    '<|message|>{"Zulu":" Bravo"}<|call|>',
    " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>[1]<|call|>",
    "<|channel|>analysis to=python code<|message|>print('Alpha')\nZulu<|call|>"
    "<|start|>python to=assistant<|channel|>analysis<|message|> Bravo<|end|>"
    "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|return|>",
]


def pool() -> tuple[list[list[int]], list[float]]:
    """Pieces of random streams and their weights."""
    encode = load_vocabulary().encode
    marks = [Special.START, Special.CHANNEL, Special.MESSAGE, Special.END, Special.CONSTRAIN]
    stops = [Special.RETURN, Special.CALL, Special.ENDOFTEXT]
    groups = [
        ([[int(token)] for token in marks], 4.0),
        ([[int(token)] for token in stops], 1.0),
        ([encode(word) for word in HEADER_WORDS], 2.0),
        ([encode(word) for word in FILLERS], 3.0),
        ([[token] for token in BROKEN_UTF8], 0.5),
        ([[token] for token in STRANGE], 0.3),
    ]
    pieces = [piece for group, _ in groups for piece in group]
    return pieces, [weight for group, weight in groups for _ in group]


PIECES, WEIGHTS = pool()
STREAMS = [load_vocabulary().encoding.encode(s, allowed_special="all") for s in WELL_FORMED]


def random_stream(rng: random.Random) -> list[int]:
    pieces = rng.choices(PIECES, WEIGHTS, k=rng.randrange(1, 14))
    return [token for piece in pieces for token in piece]


def mutated_stream(rng: random.Random) -> list[int]:
    tokens = list(rng.choice(STREAMS))
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(tokens) + 1)
        match rng.randrange(5):
            case 0:
                del tokens[place : place + rng.randrange(1, 3)]
            case 1:
                tokens[place:place] = random_stream(rng)[:3]
            case 2:
                tokens[place:place] = tokens[place : place + 3]
            case 3:
                other = rng.randrange(len(tokens) + 1)
                tokens[min(place, other) : max(place, other)] = []
            case _:
                tokens = tokens[:place]
    return tokens


def stream(seed: int) -> list[int]:
    rng = random.Random(seed)
    return random_stream(rng) if seed % 2 else mutated_stream(rng)


def events_of(tokens: list[int]) -> list[Event]:
    parser = HarmonyParser(TOOLS)
    events = [event for token in tokens for event in parser.feed(token)]
    return events + parser.finish()


def strings(value: Any) -> Iterator[str]:
    """Every string in an event, but for a content type's own spelling of `<|constrain|>`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, MessageDone):
        message = dataclasses.replace(value.message, content_type=None)
        yield from strings(dataclasses.asdict(message))
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif dataclasses.is_dataclass(value):
        yield from strings({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


def text_in(tokens: list[int] | tuple[int, ...]) -> str:
    """The ordinary text of tokens, decoded at once."""
    spelled = load_vocabulary().tokens
    data = b"".join(spelled[token] for token in tokens if 0 <= token < N_TEXT)
    return data.decode("utf-8", errors="replace")


def text_between(tokens: list[int]) -> str:
    """The ordinary text of tokens, cut at every control token."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts[-1].append(token) if 0 <= token < N_TEXT else parts.append([])
    return "|".join(text_in(part) for part in parts)


def told(events: list[Event]) -> str:
    """All text that reached someone: deltas, repairs, and what a header named."""
    parts = []
    for event in events:
        if isinstance(event, DELTAS):
            parts.append(event.text)
        elif isinstance(event, Repair):
            parts.append(f"|{event.detail}|")
        elif isinstance(event, MessageDone):
            message = event.message
            parts.append(f"|{message.content_type}|{message.name}|{message.recipient}|")
    return "".join(parts)


def check_messages(events: list[Event]) -> None:
    """Deltas, joined, are the message's text, and the text is what its tokens hold."""
    deltas: list[str] = []
    for event in events:
        if isinstance(event, DELTAS):
            deltas.append(event.text)
        elif isinstance(event, MessageDone):
            joined = "".join(deltas)
            if event.message.recipient is None:
                assert event.message.content == joined
            if Special.MESSAGE in event.tokens:
                body = event.tokens[event.tokens.index(Special.MESSAGE) :]
                assert joined == text_in(body)
            deltas = []
    assert not deltas


def check_order(events: list[Event]) -> None:
    """A turn ends once, calls are done only where they were started, stops have reasons."""
    assert isinstance(events[-1], TurnDone)
    started: list[str] = []
    for event in events:
        if isinstance(event, ToolCallStarted):
            started.append(event.name)
        elif isinstance(event, ToolCallDone):
            assert started.pop() == event.name == TOOLS[event.recipient]
        elif isinstance(event, MessageDone):
            started = []


@pytest.mark.parametrize("batch", range(BATCHES))
def test_any_stream_is_taken_and_nothing_is_lost(batch: int) -> None:
    fillers = [word.strip() for word in FILLERS]
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        tokens = stream(seed)
        events = events_of(tokens)
        for event in events:
            for string in strings(event):
                assert "<|" not in string, f"seed {seed}: {event}"
        check_messages(events)
        check_order(events)
        source, target = text_between(tokens), told(events)
        counted = Counter({word: source.count(word) for word in fillers})
        missing = counted - Counter({word: target.count(word) for word in fillers})
        assert not missing, f"seed {seed}: {missing} in {load_vocabulary().decode_bytes(tokens)!r}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_parsers_share_nothing_and_chunks_do_not_matter(batch: int) -> None:
    """Two parsers fed in turns, in chunks of any size, tell what each tells alone."""
    rng = random.Random(batch)
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH, 2):
        streams = [stream(seed), stream(seed + 1)]
        parsers = [HarmonyParser(TOOLS), HarmonyParser(TOOLS)]
        found: list[list[Event]] = [[], []]
        waiting = [list(tokens) for tokens in streams]
        while any(waiting):
            which = rng.randrange(2)
            size = rng.randrange(1, 9)
            chunk, waiting[which] = waiting[which][:size], waiting[which][size:]
            found[which] += [event for token in chunk for event in parsers[which].feed(token)]
        for which in range(2):
            assert found[which] + parsers[which].finish() == events_of(streams[which])


def test_every_prefix_of_a_stream_tells_a_prefix_of_its_events() -> None:
    for tokens in STREAMS:
        whole = events_of(tokens)
        for cut in range(len(tokens)):
            parser = HarmonyParser(TOOLS)
            events = [event for token in tokens[:cut] for event in parser.feed(token)]
            assert events == whole[: len(events)]
            assert not any(isinstance(event, ToolCallDone) for event in parser.finish())
