"""What turns reuse of each other: counts that the drop rule predicts, and bits of a cold run.

The window is the published 128. But for the demo's, the weights are random, and what is sampled is
given, so that the turns have tools and reasoning; the logits behind it are the model's.
"""

from collections.abc import Callable, Iterator
from functools import partial
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
    WatchedModel,
    cold,
    new_model,
    size,
)

from mlx_gptoss import library
from mlx_gptoss.cache_folder import CacheFolder, open_folder
from mlx_gptoss.harmony import Channel, Message, ToolDescription, tool_result, user
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.prefix_cache import MOST_SAVED
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tools import call, describe
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


def check_cold(
    model: Model, first: tuple[Route, np.ndarray], prompt_tokens: int, *, atol: float = 2e-4
) -> None:
    """Compare the logits at the end of a prompt with those of a model that has nothing cached."""
    route, logits = first
    assert sum(len(piece) for _, piece in route) == prompt_tokens
    same, whole = cold(model, route)
    assert np.array_equal(logits, same), f"{prompt_tokens} tokens"
    np.testing.assert_allclose(logits, whole, atol=atol, rtol=0)


def ask(runtime: Runtime, messages: list[Message]) -> Reply:
    return runtime.respond(messages, instructions="Look things up.", tools=[LOOK], sampling=GREEDY)


def test_twenty_turns_with_tools_compute_what_the_rule_predicts_and_the_same_bits(
    opened: Callable[..., Opened], cold_model: Model, tmp_path: Path
) -> None:
    """Every second reply is another runtime's, which knows of the others from the folder alone."""
    files = partial(CacheFolder, tmp_path, identity="0" * 16)
    runtime, model = opened(files=lambda _: files())
    lengths = []

    def respond(messages: list[Message], script: str) -> Reply:
        nonlocal runtime, model
        if len(lengths) % 2:
            runtime.close()
            route = model.last
            runtime, model = opened(files=lambda _: files())
            model.before = route
        model.script = script
        reply = ask(runtime, messages)
        lengths.append(reply.usage.prompt_tokens)
        if len(lengths) in (3, 10, 19, 28, 35, 38):
            check_cold(cold_model, model.first, lengths[-1])
        return reply

    talk(respond)
    assert len(lengths) == 39 and lengths[-1] > 3 * 128
    runtime.close()
    assert len(list(tmp_path.iterdir())) == 2, "the instructions, and the conversation"


DEMO_QUESTIONS = [
    "What is the capital of France?",
    "Hello!",
    "What is the opposite of hot?",
    "What is the capital of Spain?",
    "Thank you!",
    "What is the opposite of big?",
    "What color is the sky?",
    "What is the capital of Italy?",
]
TOOL_QUESTIONS = ["What is the weather in Paris?", "What is 12 + 30?"]


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return f'{{"temperature":{len(city)},"sky":"windy"}}'


def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


def test_twenty_turns_of_the_demo_with_tools_and_restarts(tmp_path: Path) -> None:
    """What it says is sampled; after 7 and after 14 turns another runtime goes on."""
    folder = library.find_model("demo")
    functions = {"get_weather": get_weather, "add": add}
    tools = [describe(function) for function in functions.values()]
    route: Route = []
    messages: list[Message] = []
    turn: list[Message] = []
    calls = 0
    for number in range(20):
        if number % 7 == 0:
            model = WatchedModel(load_model(folder, dtype="float32"))
            model.before = route
            runtime = Runtime(
                lambda model=model: harmony_engine(model),  # type: ignore[arg-type]
                files=partial(open_folder, tmp_path, folder),
            )
        texts = DEMO_QUESTIONS if number < 15 else TOOL_QUESTIONS
        question = user(texts[number % len(texts)])
        expected = kept_of(turn, question) if turn else 0
        turn = [question]
        while True:
            reply = runtime.respond(
                [*messages, *turn], tools=tools, reasoning="low", sampling=GREEDY
            )
            computed = reply.usage.prompt_tokens - reply.usage.cached_tokens
            assert computed == (expected or reply.usage.prompt_tokens), number
            if number == 7:
                check_cold(model.model, model.first, reply.usage.prompt_tokens, atol=1e-2)
            turn += reply.messages
            if not reply.tool_calls:
                break
            [made] = reply.tool_calls
            result = call(functions[made.name], made.arguments)
            turn.append(tool_result(made.recipient, result))
            expected, calls = 1 + size(turn[-1]) + HEADER, calls + 1
        messages += turn
        route = model.last
        if number % 7 == 6 or number == 19:
            runtime.close()
    assert calls and reply.usage.prompt_tokens > 3 * 128


def kept_of(turn: list[Message], question: Message) -> int:
    """Tokens to compute after a turn: what follows its first reasoning, which is dropped."""
    reasoned = [m.channel == Channel.ANALYSIS for m in turn]
    if not any(reasoned):
        return 1 + size(question) + HEADER  # <|return|>, sampled and not fed
    rest = turn[reasoned.index(True) :]
    return size(*(m for m in rest if m.channel != Channel.ANALYSIS), question) + HEADER


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
