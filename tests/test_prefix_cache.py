"""What turns reuse of each other: counts that the drop rule predicts, and bits of a cold run.

The weights are random and the window is the published 128. What is sampled is given, so that the
turns have tools and reasoning; the logits behind it are the model's.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import scripted
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.harmony import Channel, Message, ToolDescription, render_message, tool_result, user
from mlx_gptoss.model import Model
from mlx_gptoss.prefix_cache import MOST_SAVED
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import harmony_engine
from mlx_gptoss.vocabulary import N_VOCAB

FOLD = 1024  # ids of the real vocabulary stand for those of the tiny model, modulo this
REASONING = "<|channel|>analysis<|message|>Hm {}<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{{"at":{}}}<|call|>'
ANSWER = "<|channel|>final<|message|>So {}<|return|>"
GREEDY = SamplingParams(temperature=0)
LOOK = ToolDescription(name="look", parameters={"type": "object"})
HEADER = 2  # <|start|>assistant
Route = list[tuple[int, list[int]]]  # what was fed, by position


class GivenModel:
    """Computes a real model, and says what it is told to.

    Attributes:
        routes: For each cache, the pieces that made what it holds.
        first: The route and the (FOLD,) logits at the end of the last prompt.
    """

    def __init__(self, model: Model):
        self.config = SimpleNamespace(vocab_size=N_VOCAB, max_position_embeddings=131_072)
        self.model, self.script = model, ""
        self.kernels = model.kernels
        self.routes: dict[int, Route] = {}
        self.first: tuple[Route, np.ndarray] = ([], np.zeros(0))
        self.computed = 0

    def make_cache(self) -> ModelCache:
        return self.model.make_cache()

    def hidden(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        self._note(tokens, cache)
        return self.model.hidden(tokens % FOLD, cache)

    def next_logits(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        self._note(tokens, cache)
        logits = self.model.next_logits(tokens % FOLD, cache)
        if tokens.shape[1] > 1:
            self.computed, self.start = cache.offset, cache.offset
            self.first = list(self.routes[id(cache)]), np.array(logits[0])
        script = scripted.tokens_of(self.script)
        token = script[min(cache.offset - self.start, len(script) - 1)]
        return mx.where(mx.arange(N_VOCAB) == token, 100.0, 0.0)[None]

    def _note(self, tokens: mx.array, cache: ModelCache) -> None:
        before = [piece for piece in self.routes.get(id(cache), []) if piece[0] < cache.offset]
        self.routes[id(cache)] = [*before, (cache.offset, tokens[0].tolist())]


def new_model() -> Model:
    return tiny_model(TinyShape(layers=2))


@pytest.fixture(scope="module")
def cold_model() -> Model:
    return new_model()


def cold(model: Model, route: Route) -> tuple[np.ndarray, np.ndarray]:
    """(FOLD,) logits after a route, fed anew piece by piece, and fed at once."""
    cache = model.make_cache()
    for _, piece in route[:-1]:
        model.hidden(mx.array([piece]) % FOLD, cache)
    last = model.next_logits(mx.array([route[-1][1]]) % FOLD, cache)
    whole = [token for _, piece in route for token in piece]
    return np.array(last[0]), np.array(model.next_logits(mx.array([whole]) % FOLD)[0])


Opened = tuple[Runtime, GivenModel]


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


def size(*messages: Message) -> int:
    return sum(len(render_message(message)) for message in messages)


def test_twenty_turns_with_tools_compute_what_the_rule_predicts_and_the_same_bits(
    opened: Callable[..., Opened], cold_model: Model
) -> None:
    runtime, model = opened()
    messages: list[Message] = []
    turn: list[Message] = []
    checked = 0

    def respond(script: str, expected: int | None) -> None:
        nonlocal checked
        model.script = script
        reply = runtime.respond(
            list(messages), instructions="Look things up.", tools=[LOOK], sampling=GREEDY
        )
        computed = reply.usage.prompt_tokens - reply.usage.cached_tokens
        assert computed == (reply.usage.prompt_tokens if expected is None else expected)
        assert [m.sampled is not None for m in reply.messages] == [True] * len(reply.messages)
        turn.extend(reply.messages)
        messages.extend(reply.messages)
        if number % 8 == 3:
            route, logits = model.first
            assert sum(len(piece) for _, piece in route) == reply.usage.prompt_tokens
            same, whole = cold(cold_model, route)
            assert np.array_equal(logits, same), f"turn {number}"
            np.testing.assert_allclose(logits, whole, atol=2e-4, rtol=0)
            checked += 1

    expected: int | None = None
    for number in range(20):
        question = user(
            f"Question {number}, which is quite long enough to pass the window in time, is it not?"
        )
        messages.append(question)
        if number:
            expected = size(*(m for m in turn if m.channel != Channel.ANALYSIS), question) + HEADER
        turn = []
        for _ in range(number % 3):
            respond((REASONING + CALL).format(number, number), expected)
            result = tool_result("functions.look", f"Seen {number}")
            turn.append(result)
            messages.append(result)
            expected = 1 + size(result) + HEADER  # <|call|>, sampled and not fed, and what is new
        respond((REASONING + ANSWER).format(number, number), expected)
    assert checked == 6 and sum(len(piece) for _, piece in model.first[0]) > 3 * 128


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
