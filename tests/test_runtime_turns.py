"""Turns at once: rounds, cancelling, closing, forks, event loops, faults."""

import asyncio
import gc
import logging
import multiprocessing
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
import scripted
from running import GREEDY, LONG, open_model, open_scripted, wait_until

from mlx_gptoss.errors import ContextLengthError, RuntimeClosedError
from mlx_gptoss.harmony import FinishReason, TurnDone
from mlx_gptoss.owner import Owner
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.stream import CAPACITY


@pytest.fixture
def answering() -> Iterator[tuple[Runtime, scripted.ScriptedModel]]:
    runtime, model = open_scripted(scripted.ANSWERED)
    with runtime:
        yield runtime, model


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


class LoggingModel(scripted.ScriptedModel):
    """Logs what it did: the rows of a step, or the cache that a chunk of a prompt went to."""

    def __init__(self) -> None:
        super().__init__(LONG)
        self.log: list[int | scripted.ScriptedCache] = []

    def hidden(self, tokens: mx.array, cache: scripted.ScriptedCache) -> None:
        super().hidden(tokens, cache)
        if tokens.shape[1] > 1:
            self.log.append(cache)

    def step_rows(self, tokens: mx.array, caches: Sequence[scripted.ScriptedCache]) -> mx.array:
        self.log.append(len(caches))
        return super().step_rows(tokens, caches)


def test_turns_that_write_take_their_steps_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gptoss.stream.CAPACITY", 10**6)
    with open_model(model := LoggingModel()) as runtime:
        turns = [runtime.stream("Hi", sampling=GREEDY, max_tokens=200) for _ in range(4)]
        assert len({turn.reply().text for turn in turns}) == 1
    rows = [entry for entry in model.log if isinstance(entry, int)]
    assert max(rows) == 4 and sum(rows) == 4 * 199, "no step but those that gave a token"


def test_prompts_are_fed_in_turn_and_steps_go_on_between_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_gptoss.stream.CAPACITY", 10**6)  # the writing turn waits for no reader
    with open_model(model := LoggingModel()) as runtime:
        writing = runtime.stream("Hi", sampling=GREEDY)
        next(writing)
        began = len(model.log)
        reading = [
            runtime.stream("word " * words, sampling=GREEDY, max_tokens=2) for words in (3000, 5000)
        ]
        for turn in reading:
            turn.reply()
        writing.close()
    log = model.log[began:]
    both = [isinstance(entry, int) for entry in log]
    assert all(step or after for step, after in pairwise(both)), "two chunks without a step between"
    fed = [entry for entry in log if not isinstance(entry, int)]
    assert len({id(cache) for cache in fed}) == 2 and len(fed) > 12
    first, last = fed.index(fed[-1]), max(n for n, cache in enumerate(fed) if cache is fed[0])
    assert last > first and all(a is not b for a, b in pairwise(fed[first - 1 : last + 1]))


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


def test_a_fault_in_one_turn_is_its_own(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering
    model.config.max_position_embeddings = 50
    with pytest.raises(ContextLengthError, match="prompt: expected fewer than 50 tokens"):
        runtime.respond("Hi")
    model.config.max_position_embeddings = 5000
    assert runtime.respond("Hi", sampling=GREEDY).text


def test_a_fault_of_the_owner_is_logged_once_and_told_to_everybody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its cause was told to those who waited, without where it came from, and to nobody later."""
    runtime, model = open_scripted(LONG, concurrent=1)
    held = weakref.ref(model)
    running, waiting = (runtime.stream("Hi", sampling=GREEDY) for _ in range(2))

    def broken(self: Owner, engine: Any) -> None:
        raise MemoryError("out of it")

    monkeypatch.setattr(Owner, "_go_round", broken)
    errors = []
    for use in (lambda: list(running), lambda: list(waiting), lambda: runtime.respond("Hi")):
        with pytest.raises(
            RuntimeClosedError,
            match="runtime: ended by a fault of its own, MemoryError: out of it; its traceback is "
            "in the log; open another one",
        ) as caught:
            use()
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3
    assert all(isinstance(error.__cause__, MemoryError) for error in errors)
    [record] = caplog.records
    assert record.levelno == logging.ERROR and record.name == "mlx_gptoss"
    assert record.exc_text and "in broken" in record.exc_text
    runtime.close()
    del model
    gc.collect()
    assert held() is None, "the error holds no model"


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
