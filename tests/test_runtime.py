"""The runtime: conversations of every form, threads, event loops, cancelling, closing, refusing."""

import asyncio
import gc
import multiprocessing
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import scripted
from tiny import TinyShape, write_checkpoint
from weights import tiny_model

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import (
    ContextLengthError,
    GptOssError,
    HarmonyError,
    MachineError,
    RuntimeClosedError,
)
from mlx_gptoss.harmony import FinishReason, TextDelta, TurnDone, user
from mlx_gptoss.memory import Memory, memory_of
from mlx_gptoss.owner import Owner
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.stream import CAPACITY
from mlx_gptoss.turn import harmony_engine
from mlx_gptoss.vocabulary import N_VOCAB, load_vocabulary

GREEDY = SamplingParams(temperature=0)
LONG = "<|channel|>final<|message|>" + "word " * 400 + "<|return|>"
CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"


def open_scripted(script: str, **options: Any) -> tuple[Runtime, scripted.ScriptedModel]:
    model = scripted.ScriptedModel(script)
    return Runtime(lambda: harmony_engine(model), **options), model  # type: ignore[arg-type]


@pytest.fixture
def answering() -> Iterator[tuple[Runtime, scripted.ScriptedModel]]:
    runtime, model = open_scripted(scripted.ANSWERED)
    with runtime:
        yield runtime, model


def test_a_reply_says_everything(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering
    reply = runtime.respond("Two and two?", reasoning="low", instructions="Be brief.",
                            sampling=GREEDY)  # fmt: skip
    assert (reply.text, reply.reasoning) == ("Four, naïvely: 4.", "Two and two.")
    assert reply.tool_calls == () and reply.finish_reason is FinishReason.STOP
    assert reply.usage.prompt_tokens == len(model.prompt)
    assert reply.usage.completion_tokens == len(scripted.tokens_of(scripted.ANSWERED))
    assert reply.timing.ttft_s and reply.timing.decode_tok_per_s
    told = load_vocabulary().decode(model.prompt)
    assert "Reasoning: low" in told and "# Instructions\n\nBe brief.<|end|>" in told
    assert [m.channel for m in reply.messages] == ["analysis", "final"]


def test_a_stream_is_its_reply(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, _ = answering
    with runtime.stream("Hi", sampling=GREEDY) as stream:
        events = list(stream)
    assert events[-1] == TurnDone(FinishReason.STOP) and next(stream, None) is None
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text == stream.reply().text == "Four, naïvely: 4."


def test_chat_dictionaries_are_read(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering
    call = {"id": "c1", "type": "function", "function": {"name": "get-weather", "arguments": "{}"}}
    runtime.respond(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Rain "}, {"text": "today?"}]},
            {"role": "assistant", "content": None, "reasoning": "Look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        ],
        tools=[{"type": "function", "function": {"name": "get-weather", "description": "Sky."}}],
        response_format={"type": "text"},
        sampling=GREEDY,
    )
    told = load_vocabulary().decode(model.prompt)
    assert "Be kind.\n\n# Tools" in told and "type get_weather = () => any;" in told
    assert "// Sky." in told
    assert told.endswith(
        "<|start|>user<|message|>Rain today?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json"
        "<|message|>{}<|call|>"
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sun<|end|>"
        "<|start|>assistant"
    )


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([], {}, "messages: expected one of the user at least, got none"),
        ([{"role": "robot"}], {}, "messages[0].role: expected system, developer, user"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content[0]: expected text, got 3"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            {},
            "messages[0].content[0]: expected text, got {'type': 'image_url'}; gpt-oss reads text",
        ),
        (
            [{"role": "tool", "tool_call_id": "x", "content": ""}],
            {},
            "messages[0].tool_call_id: expected the id of a call before it, got 'x'",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "no"}}]}],
            {},
            "tool 'no': expected one of []",
        ),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            {},
            "messages[0].tool_calls[0].function.name: expected the name of a tool, got {}",
        ),
        ("Hi", {"reasoning": "huge"}, "reasoning: expected one of low, medium, high; got 'huge'"),
        ("Hi", {"tools": [{"type": "magic"}]}, 'tools[0]: expected {"type": "function"'),
        (
            "Hi",
            {"response_format": {"type": "json_object"}},
            'response_format: expected {"type": "text"} or {"type": "json_schema"',
        ),
    ],
)
def test_what_cannot_be_understood_is_refused_at_once(
    answering: tuple[Runtime, scripted.ScriptedModel],
    messages: Any,
    options: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(HarmonyError, match=re.escape(says)):
        answering[0].stream(messages, **options)


class Rounds(scripted.ScriptedModel):
    """Writes the next of its scripts after each prompt."""

    def __init__(self, scripts: list[str]) -> None:
        super().__init__("")
        self.scripts = scripts

    def next_logits(self, tokens: mx.array, cache: Any) -> mx.array:
        if tokens.shape[1] > 1:
            self.script = self.scripts.pop(0)
        return super().next_logits(tokens, cache)


def test_functions_are_called_and_their_answers_told() -> None:
    seen: list[tuple[str, int]] = []

    def look(place: str, days: int = 1) -> dict[str, str]:
        """Look at the sky."""
        seen.append((place, days))
        return {"sky": "blue"}

    good, wrong = CALL.format("look", '{"place": "Rome", "days": 2}'), CALL.format("look", "{}")
    model = Rounds([good, wrong, scripted.ANSWERED, good, wrong])
    with Runtime(lambda: harmony_engine(model)) as runtime:  # type: ignore[arg-type]
        run = runtime.run_tools("Sky?", [look], sampling=GREEDY)
        assert seen == [("Rome", 2)] and run.reply.text == "Four, naïvely: 4."
        told = load_vocabulary().decode(model.prompt)
        assert 'commentary<|message|>{"sky": "blue"}<|end|>' in told
        assert "<|message|>Error: TypeError: " in told and "'place'<|end|>" in told
        assert "// Look at the sky.\ntype look = (_: {\nplace: string,\ndays?: " in told
        assert [m.role for m in run.messages] == ["assistant", "tool"] * 2 + ["assistant"] * 2
        cut = runtime.run_tools("Sky?", [look], max_rounds=2, sampling=GREEDY)
        assert len(cut.reply.tool_calls) == 1 and len(cut.messages) == 3
        with pytest.raises(ValueError, match="max_rounds: expected a number >= 1, got 0"):
            runtime.run_tools("Sky?", [look], max_rounds=0)

        def bad(place: bytes) -> None: ...

        with pytest.raises(HarmonyError, match=r"bad\(place\): expected an annotation of str, int"):
            runtime.run_tools("Sky?", [bad])


def wait_until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_slow_reader_holds_up_its_own_turn_only() -> None:
    runtime, model = open_scripted(LONG)
    with runtime:
        slow = runtime.stream("Hi", sampling=GREEDY)
        wait_until(lambda: slow._outbox.is_full)
        assert runtime.respond("Hi", sampling=GREEDY, max_tokens=20).usage.completion_tokens == 20
        before = model.steps
        time.sleep(0.2)
        assert model.steps == before and slow._outbox._items.qsize() <= CAPACITY + 2
        assert slow.reply().text == "word " * 400, "the rest comes when it is read"


def test_closing_a_stream_stops_the_turn() -> None:
    runtime, model = open_scripted(LONG)
    with runtime:
        stream = runtime.stream("Hi", sampling=GREEDY)
        next(stream)
        stream.close()
        wait_until(lambda: not runtime._owner._running)
        stopped = model.steps
        assert stopped < 100 and next(stream, None) is None
        with pytest.raises(ValueError, match="stream: expected one read to its end"):
            stream.reply()
        del stream
        dropped = runtime.stream("Hi", sampling=GREEDY)
        next(dropped)
        del dropped
        gc.collect()
        wait_until(lambda: not runtime._owner._running)
        assert model.steps < stopped + 100


def test_a_prompt_is_cancelled_between_its_chunks() -> None:
    runtime, model = open_scripted(scripted.ANSWERED)
    with runtime:
        fed, slow = [], model.hidden
        stream = None

        def hidden(tokens: mx.array, cache: Any) -> None:
            slow(tokens, cache)
            fed.append(tokens.shape[1])
            wait_until(lambda: stream is not None)
            stream.close()  # type: ignore[union-attr]

        model.hidden = hidden  # type: ignore[method-assign]
        stream = runtime.stream("word " * 5000, sampling=GREEDY)
        wait_until(lambda: fed and not runtime._owner._running)
        assert len(fed) == 1 and model.steps == 0


def test_turns_share_the_device_token_by_token() -> None:
    runtime, _ = open_scripted(LONG)
    with runtime:
        long = runtime.stream("Hi", sampling=GREEDY)
        short = runtime.respond("Hi", sampling=GREEDY, max_tokens=10)
        assert short.usage.completion_tokens == 10
        assert not long._over and long._outbox._items.qsize() <= CAPACITY + 2
        long.close()


def test_close_ends_everything_and_can_be_called_again() -> None:
    runtime, _ = open_scripted(LONG, concurrent=1)
    running, waiting = (runtime.stream("Hi", sampling=GREEDY) for _ in range(2))
    next(running)
    runtime.close()
    runtime.close()
    assert not runtime._owner._thread.is_alive() and not hasattr(runtime._owner, "_prefixes")
    for stream in (running, waiting):
        with pytest.raises(RuntimeClosedError, match="runtime: closed; open another one"):
            list(stream)
    with pytest.raises(RuntimeClosedError, match="runtime: closed"):
        runtime.respond("Hi")


def test_what_loading_raises_is_raised_by_open() -> None:
    def load() -> Any:
        raise GptOssError("no such thing")

    with pytest.raises(GptOssError, match="no such thing"):
        Runtime(load)


def test_a_fault_in_one_turn_is_its_own(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering
    with pytest.raises(ValueError, match="max_tokens: expected a whole number >= 1"):
        runtime.respond("Hi", max_tokens=-1)
    model.config.max_position_embeddings = 50
    with pytest.raises(ContextLengthError, match="prompt: expected fewer than 50 tokens"):
        runtime.respond("Hi")
    model.config.max_position_embeddings = 5000
    assert runtime.respond("Hi", sampling=GREEDY).text


def test_a_fault_of_the_owner_reaches_every_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = open_scripted(LONG)
    stream = runtime.stream("Hi", sampling=GREEDY)

    def broken(self: Owner, engine: Any) -> None:
        raise MemoryError("out of it")

    monkeypatch.setattr(Owner, "_go_round", broken)
    with pytest.raises(MemoryError, match="out of it"):
        list(stream)
    with pytest.raises(RuntimeClosedError):
        runtime.respond("Hi")
    runtime.close()


def _use_after_fork(runtime: Runtime, stream: Any, told: Any) -> None:
    errors = []
    for use in (lambda: runtime.respond("Hi"), lambda: next(stream)):
        try:
            use()
        except RuntimeClosedError as error:
            errors.append(str(error))
    runtime.close()
    told.put(errors)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_it_says_so() -> None:
    runtime, _ = open_scripted(scripted.ANSWERED)
    with runtime:
        runtime.respond("Hi", sampling=GREEDY)
        stream = runtime.stream("Hi", sampling=GREEDY)
        stream.reply()
        fresh = runtime.stream("Hi", sampling=GREEDY)
        context = multiprocessing.get_context("fork")
        told = context.Queue()
        child = context.Process(target=_use_after_fork, args=(runtime, fresh, told))
        child.start()
        errors = told.get(timeout=60)
        child.join(60)
        assert len(errors) == 2 and child.exitcode == 0
        assert all("forked from" in e and "open a runtime after the fork" in e for e in errors)
        assert runtime.respond("Hi", sampling=GREEDY).text, "the parent goes on"


def test_async_is_the_same(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering

    async def use() -> None:
        replies = await asyncio.gather(*(runtime.arespond("Hi", sampling=GREEDY) for _ in range(6)))
        assert {reply.text for reply in replies} == {"Four, naïvely: 4."}
        events = [event async for event in runtime.astream("Hi", sampling=GREEDY)]
        assert events[-1] == TurnDone(FinishReason.STOP)
        model.script = LONG
        async with runtime.astream("Hi", sampling=GREEDY) as stream:
            await anext(stream)
        task = asyncio.create_task(runtime.arespond("Hi", sampling=GREEDY))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ValueError, match="stream: expected one read to its end"):
            await stream.reply()

    asyncio.run(use())
    wait_until(lambda: not runtime._owner._running)


def test_a_loop_that_ends_cancels_its_stream(
    answering: tuple[Runtime, scripted.ScriptedModel],
) -> None:
    runtime, model = answering
    model.script = LONG
    streams = []

    async def leave() -> None:
        streams.append(runtime.astream("Hi", sampling=GREEDY))
        await anext(streams[0])

    asyncio.run(leave())
    wait_until(lambda: not runtime._owner._running)


# ---- memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    convert_checkpoint(write_checkpoint(path / "source", layers=2), path / "model")
    return path / "model"


def test_what_does_not_fit_is_refused_with_numbers(folder: Path) -> None:
    with pytest.raises(
        MachineError,
        match=r"memory: the model with a context of 1024 tokens needs 0\.0\d GiB, this machine "
        r"lets 0\.00 GiB be used; see `mlx-gptoss plan`",
    ):
        memory_of(folder, limit_bytes=2**20)
    memory = memory_of(folder, limit_bytes=160 * 2**20)
    assert memory is not None and 1024 < memory.longest < 131_072
    assert memory.grant(100, None) == memory.longest and memory.grant(100, 50) == 150
    with pytest.raises(
        MachineError,
        match=rf"memory: 100 prompt tokens with max_tokens=131000 need \d\.\d\d GiB, this machine "
        rf"lets 0\.16 GiB be used, enough for {memory.longest} tokens in all; lower max_tokens",
    ):
        memory.grant(100, 131_000)
    assert memory.free_bytes([memory.longest]) >= 0 > memory.free_bytes([memory.longest] * 2)
    unlimited = memory_of(folder, limit_bytes=None)
    assert unlimited is None or unlimited.longest == 131_072


def test_turns_wait_for_memory_and_idle_conversations_make_room(folder: Path) -> None:
    memory = memory_of(folder, limit_bytes=160 * 2**20)
    assert isinstance(memory, Memory)
    runtime, _ = open_scripted(LONG, admission=memory)
    with runtime:
        first = runtime.stream("Hi", sampling=GREEDY)
        next(first)
        second = runtime.stream("Hi", sampling=GREEDY, max_tokens=5)
        third = runtime.stream("Hi", sampling=GREEDY)  # reserves all there is, as the first does
        wait_until(lambda: first._outbox.is_full)
        assert len(runtime._owner._running) == 1
        first.close()
        assert second.reply().usage.completion_tokens == 5
        assert third.reply().finish_reason is FinishReason.STOP


# ---- threads


class FoldedModel:
    """A real tiny model whose 1024 ids stand for the whole vocabulary."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=N_VOCAB, max_position_embeddings=131_072)
        self._model = tiny_model(TinyShape(layers=2))
        self.kernels = self._model.kernels
        self._ids = mx.arange(N_VOCAB) % 1024

    def make_cache(self) -> ModelCache:
        return self._model.make_cache()

    def hidden(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        return self._model.hidden(tokens % 1024, cache)

    def next_logits(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        return self._model.next_logits(tokens % 1024, cache)[:, self._ids]

    def step_rows(self, tokens: mx.array, caches: Sequence[ModelCache]) -> mx.array:
        return self._model.step_rows(tokens % 1024, caches)[:, self._ids]


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def shared() -> Iterator[Runtime]:
    with Runtime(lambda: harmony_engine(FoldedModel())) as runtime:  # type: ignore[arg-type]
        yield runtime


def sampled(reply: Any) -> list[int]:
    return [token for message in reply.messages for token in message.sampled or ()] + [
        reply.usage.completion_tokens
    ]


REQUESTS = [(f"Question {n}", SamplingParams(seed=n), 1 + n % 3) for n in range(20)]


def test_threads_get_what_they_get_alone_and_nothing_leaks(shared: Runtime) -> None:
    """8 threads, 50 short requests each, a third of them cancelled at a random moment."""
    alone = [
        shared.respond(text, sampling=sampling, max_tokens=tokens)
        for text, sampling, tokens in REQUESTS
    ]
    wrong: list[Any] = []
    sizes: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for count in range(50):
            place = rng.randrange(len(REQUESTS))
            text, sampling, tokens = REQUESTS[place]
            stream = shared.stream(text, sampling=sampling, max_tokens=tokens)
            if rng.random() < 1 / 3:
                if rng.random() < 0.5:
                    next(stream, None)
                stream.close()
                continue
            reply = stream.reply()
            if (reply.text, reply.reasoning, sampled(reply)) != (
                alone[place].text, alone[place].reasoning, sampled(alone[place])
            ):  # fmt: skip
                wrong.append((number, count, place))
            if number == 0:
                sizes.append(rss_bytes())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive(), "deadlock"
    assert not wrong
    middle = len(sizes) // 2
    assert max(sizes[middle:]) < max(sizes[:middle]) + 48 * 2**20, "memory grows"


def test_async_tasks_get_what_they_get_alone(shared: Runtime) -> None:
    alone = [sampled(shared.respond(t, sampling=s, max_tokens=n)) for t, s, n in REQUESTS[:8]]

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(shared.arespond(t, sampling=s, max_tokens=n) for t, s, n in REQUESTS[:8])
        )

    assert [sampled(reply) for reply in asyncio.run(together())] == alone


def test_open_finds_loads_and_frees(folder: Path) -> None:
    """The tiny model has another vocabulary, which is told when it is opened."""
    with pytest.raises(GptOssError, match="vocab_size: expected 201088"):
        Runtime.open(str(folder))
    with pytest.raises(MachineError, match="memory: the model with a context"):
        Runtime.open(str(folder), memory_limit_bytes=1000)
    with pytest.raises(ValueError, match="concurrent: expected 1 to 16, got 0"):
        Runtime.open(str(folder), concurrent=0)
    with pytest.raises(ValueError, match="cache_bytes: expected a number >= 0, got -1"):
        Runtime.open(str(folder), cache_bytes=-1)


def test_messages_of_ours_say_everything_themselves(
    answering: tuple[Runtime, scripted.ScriptedModel],
) -> None:
    from mlx_gptoss.harmony import DeveloperContent, SystemContent, developer, system

    runtime, model = answering
    head = [system(SystemContent(date=None)), developer(DeveloperContent(instructions="Sing."))]
    runtime.respond([*head, user("Hi")], sampling=GREEDY)
    told = load_vocabulary().decode(model.prompt)
    assert "Current date" not in told and "Sing." in told
    with pytest.raises(HarmonyError, match=r"messages\[0\]: a system message of your own says"):
        runtime.respond([*head, user("Hi")], reasoning="low")
    with pytest.raises(HarmonyError, match="expected a user's after your own system message"):
        runtime.respond(head)
