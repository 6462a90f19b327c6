"""What turns reuse of each other: counts that the drop rule predicts, and bits of a cold run.

The weights are random and the window is the published 128. What is sampled is given, so that the
turns have tools and reasoning; the logits behind it are the model's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from given import (
    ANSWER,
    CALL,
    HEADER,
    REASONING,
    GivenModel,
    Route,
    cold,
    new_model,
    size,
)

from mlx_gptoss.cache_folder import CacheFolder
from mlx_gptoss.harmony import Channel, Message, ToolDescription, tool_result, user
from mlx_gptoss.model import Model
from mlx_gptoss.prefix_cache import MOST_SAVED
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import Reply, harmony_engine

GREEDY = SamplingParams(temperature=0)
LOOK = ToolDescription(name="look", parameters={"type": "object"})


@pytest.fixture(scope="module")
def cold_model() -> Model:
    return new_model()


Opened = tuple[Runtime, GivenModel]
Respond = Callable[[list[Message], str], Reply]


@pytest.fixture
def opened() -> Iterator[Callable[..., Opened]]:
    runtimes = []

    def open_runtime(**options) -> Opened:
        models: list[GivenModel] = []

        def load():
            models.append(GivenModel(new_model()))
            return harmony_engine(models[0])  # type: ignore[arg-type]

        runtimes.append(Runtime(load, **options))
        return runtimes[-1], models[0]

    yield open_runtime
    for runtime in runtimes:
        runtime.close()


def talk(respond: Respond) -> None:
    """Twenty turns with 0, 1 or 2 calls of a tool; each reply computes what the rule predicts."""
    messages: list[Message] = []
    turn: list[Message] = []
    expected = 0

    def step(script: str) -> None:
        reply = respond(list(messages), script)
        computed = reply.usage.prompt_tokens - reply.usage.cached_tokens
        assert computed == (expected or reply.usage.prompt_tokens), len(messages)
        assert [m.sampled is not None for m in reply.messages] == [True] * len(reply.messages)
        turn.extend(reply.messages)
        messages.extend(reply.messages)

    for number in range(20):
        question = user(
            f"Question {number}, which is quite long enough to pass the window in time, is it not?"
        )
        messages.append(question)
        if number:
            expected = size(*(m for m in turn if m.channel != Channel.ANALYSIS), question) + HEADER
        turn.clear()
        for _ in range(number % 3):
            step((REASONING + CALL).format(number, number))
            result = tool_result("functions.look", f"Seen {number}")
            turn.append(result)
            messages.append(result)
            expected = 1 + size(result) + HEADER  # <|call|>, sampled and not fed, and what is new
        step((REASONING + ANSWER).format(number, number))


def check_cold(model: Model, first: tuple[Route, np.ndarray], prompt_tokens: int) -> None:
    """Compare the logits at the end of a prompt with those of a model that has nothing cached."""
    route, logits = first
    assert sum(len(piece) for _, piece in route) == prompt_tokens
    same, whole = cold(model, route)
    assert np.array_equal(logits, same), f"{prompt_tokens} tokens"
    np.testing.assert_allclose(logits, whole, atol=2e-4, rtol=0)


def ask(runtime: Runtime, messages: list[Message]) -> Reply:
    return runtime.respond(messages, instructions="Look things up.", tools=[LOOK], sampling=GREEDY)


def test_twenty_turns_with_tools_compute_what_the_rule_predicts_and_the_same_bits(
    opened: Callable[..., Opened], cold_model: Model
) -> None:
    runtime, model = opened()
    lengths = []

    def respond(messages: list[Message], script: str) -> Reply:
        model.script = script
        reply = ask(runtime, messages)
        lengths.append(reply.usage.prompt_tokens)
        if len(lengths) % 8 == 3:
            check_cold(cold_model, model.first, lengths[-1])
        return reply

    talk(respond)
    assert len(lengths) == 39 and lengths[-1] > 3 * 128


def test_twenty_turns_in_a_process_each_are_the_same(
    opened: Callable[..., Opened], cold_model: Model, tmp_path: Path
) -> None:
    """The runtime is closed before every reply: what it knows of the others is in the folder."""
    route: Route = []
    count = 0

    def respond(messages: list[Message], script: str) -> Reply:
        nonlocal route, count
        runtime, model = opened(files=lambda _: CacheFolder(tmp_path, identity="0" * 16))
        model.script, model.before = script, route
        reply = ask(runtime, messages)
        runtime.close()
        route, count = model.last, count + 1
        if count % 8 == 4:
            check_cold(cold_model, model.first, reply.usage.prompt_tokens)
        return reply

    talk(respond)
    assert len(list(tmp_path.iterdir())) == 2, "the instructions, and the conversation"


def test_instructions_seen_before_serve_another_conversation(
    opened: Callable[..., Opened], cold_model: Model
) -> None:
    runtime, model = opened()
    model.script = REASONING.format(1) + ANSWER.format(1)
    told = "Be brief. " * 30
    first = runtime.respond("One?", instructions=told, sampling=GREEDY)
    other = runtime.respond("Two?", instructions=told, sampling=GREEDY)
    assert other.usage.cached_tokens == other.usage.prompt_tokens - size(user("Two?")) - HEADER
    going_on = [user("One?"), *first.messages, user("And?")]
    again = runtime.respond(going_on, instructions=told, sampling=GREEDY)
    answer = first.messages[-1]
    computed = again.usage.prompt_tokens - again.usage.cached_tokens
    assert computed == size(answer, user("And?")) + HEADER, "the other conversation took its slot"
    unlike = runtime.respond("One?", instructions="Something else.", sampling=GREEDY)
    assert unlike.usage.cached_tokens == 0
    # asked once more: only the header is new
    assert runtime.respond("Two?", instructions=told, sampling=GREEDY).usage.cached_tokens == (
        other.usage.prompt_tokens - HEADER
    )


def test_the_budget_is_kept_and_the_oldest_go_first(opened: Callable[..., Opened]) -> None:
    one_ring = 2 * 2 * 128 * 64 * 4  # keys and values, float32
    runtime, model = opened(cache_bytes=60 * one_ring)
    prefixes = None
    model.script = ANSWER.format(1)
    histories = []
    for name in "abcdefgh":
        question = user(f"I am {name}")
        histories.append(
            [question, *runtime.respond([question], sampling=GREEDY).messages, user("Who am I?")]
        )
        prefixes = runtime_prefixes(runtime)
        assert prefixes.nbytes <= 60 * one_ring
    cached = [runtime.respond(h, sampling=GREEDY).usage.cached_tokens for h in reversed(histories)]
    assert cached[0] > cached[-1], "the newest was kept, the oldest was not"
    runtime, model = opened(cache_bytes=0)
    model.script = ANSWER.format(1)
    assert [runtime.respond("Hi", sampling=GREEDY).usage.cached_tokens for _ in range(2)] == [0, 0]


def runtime_prefixes(runtime: Runtime):
    return runtime._owner._prefixes


def test_places_to_go_back_to_are_bounded(opened: Callable[..., Opened]) -> None:
    runtime, model = opened()
    messages: list[Message] = []
    for number in range(MOST_SAVED + 3):
        messages.append(user(f"{number}?"))
        model.script = ANSWER.format(number)
        messages += runtime.respond(messages, sampling=GREEDY).messages
    [slot] = runtime_prefixes(runtime)._idle
    assert len(slot.ledger.positions) == MOST_SAVED
    assert (
        runtime.respond([user("other")], sampling=GREEDY).usage.cached_tokens
        == slot.ledger.positions[0]
    )
