"""The runtime in an event loop, which nothing may hold up."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scripted
from running import GREEDY, LONG, open_scripted, wait_until

from mlx_gptoss.errors import HarmonyError, RuntimeClosedError, SchemaError
from mlx_gptoss.harmony import ResponseFormat, TurnDone
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import packed
from mlx_gptoss.vocabulary import N_VOCAB

TIMES = ResponseFormat(name="times", schema={"type": "integer"})


@pytest.fixture
def answering() -> Iterator[tuple[Runtime, scripted.ScriptedModel]]:
    runtime, model = open_scripted(scripted.ANSWERED)
    with runtime:
        yield runtime, model


class FreeGuide:
    """Allows every token, once it is compiled; that lasts until `ready`, and may fail."""

    begun, ready = threading.Event(), threading.Event()
    compiled: list["FreeGuide"]
    fault: BaseException | None

    def __init__(self, rules: Any) -> None:
        self.begun.set()
        if not self.ready.wait(30):
            raise AssertionError("the event loop stood still while a schema was compiled")
        if self.fault:
            raise self.fault
        self.compiled.append(self)

    def allowed(self) -> np.ndarray:
        return packed(np.ones(N_VOCAB))

    def accept(self, token: int) -> None:
        pass


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> type[FreeGuide]:
    FreeGuide.begun.clear()
    FreeGuide.ready.clear()
    FreeGuide.compiled, FreeGuide.fault = [], None
    monkeypatch.setattr("mlx_gptoss.request.Guide", FreeGuide)
    return FreeGuide


async def while_it_compiles(compiling: type[FreeGuide]) -> None:
    """What another task of the loop does; without it, compiling never ends."""
    while not compiling.begun.is_set():
        await asyncio.sleep(0.001)


def test_the_loop_goes_on_while_a_schema_is_compiled(
    answering: tuple[Runtime, scripted.ScriptedModel], compiling: type[FreeGuide]
) -> None:
    """Schemas were compiled in the event loop, the first one for a second or more."""
    runtime, _ = answering

    async def tick() -> None:
        await while_it_compiles(compiling)
        free = await runtime.arespond("Hi", sampling=GREEDY)
        assert free.text, "nor do turns without a schema wait for it"
        compiling.ready.set()

    async def use() -> None:
        stream = runtime.astream("Hi", response_format=TIMES, sampling=GREEDY)
        asking = runtime.arespond("Hi", response_format=TIMES, sampling=GREEDY)
        reply, _ = await asyncio.gather(asking, tick())
        assert reply.text == "Four, naïvely: 4." and len(compiling.compiled) == 2
        assert [event async for event in stream][-1] == TurnDone(reply.finish_reason)

    asyncio.run(use())


def test_a_schema_that_cannot_be_held_is_told_where_it_is_awaited(
    answering: tuple[Runtime, scripted.ScriptedModel], compiling: type[FreeGuide]
) -> None:
    runtime, _ = answering
    compiling.fault = SchemaError("times: no such schema")
    compiling.ready.set()

    async def use() -> None:
        with pytest.raises(SchemaError, match="times: no such schema"):
            await runtime.arespond("Hi", response_format=TIMES)
        stream = runtime.astream("Hi", response_format=TIMES)
        with pytest.raises(SchemaError, match="times: no such schema"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(HarmonyError, match="messages: expected one of the user"):
            runtime.astream([], response_format=TIMES)

    asyncio.run(use())
    with pytest.raises(SchemaError, match="times: no such schema"):
        runtime.stream("Hi", response_format=TIMES)


class PanicException(BaseException):
    """As what Rust raises where it gives up is called, which is no `Exception`."""


def test_a_compiler_that_panics_is_told(
    answering: tuple[Runtime, scripted.ScriptedModel], compiling: type[FreeGuide]
) -> None:
    """The executor kept it to itself, and whoever read the turn waited for ever."""
    runtime, _ = answering
    compiling.fault = PanicException("index out of bounds")
    compiling.ready.set()

    async def use() -> None:
        with pytest.raises(PanicException, match="index out of bounds"):
            await asyncio.wait_for(runtime.arespond("Hi", response_format=TIMES), 30)

    asyncio.run(use())


def test_a_turn_cancelled_while_its_schema_is_compiled_never_begins(
    answering: tuple[Runtime, scripted.ScriptedModel], compiling: type[FreeGuide]
) -> None:
    runtime, model = answering
    model.script = LONG

    async def use() -> None:
        first = asyncio.create_task(runtime.arespond("Hi", response_format=TIMES))
        second = runtime.astream("Hi", response_format=TIMES)
        await while_it_compiles(compiling)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second.aclose()
        compiling.ready.set()

    asyncio.run(use())
    wait_until(lambda: not runtime._intake._compiler._work_queue.qsize())
    runtime.close()
    assert len(compiling.compiled) == 1 and model.steps == 0


def test_closing_while_a_schema_is_compiled_is_told(compiling: type[FreeGuide]) -> None:
    runtime, _ = open_scripted(scripted.ANSWERED)

    async def use() -> None:
        turns = [runtime.arespond("Hi", response_format=TIMES) for _ in range(2)]
        waiting = asyncio.gather(*turns, return_exceptions=True)
        await while_it_compiles(compiling)
        closing = asyncio.create_task(asyncio.to_thread(runtime.close))
        while not runtime._owner._closed:
            await asyncio.sleep(0.001)
        compiling.ready.set()
        errors = await waiting
        await closing
        assert [type(error) for error in errors] == [RuntimeClosedError] * 2

    asyncio.run(use())
    assert len(compiling.compiled) == 1, "nothing is compiled for a closed runtime"
