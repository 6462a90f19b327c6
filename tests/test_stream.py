"""Streams: read slowly, by several, not at all, closed, dropped."""

import asyncio
import gc
import threading
import time
import weakref

import pytest
import scripted
from running import GREEDY, LONG, open_model, open_scripted, wait_until

from mlx_gptoss.harmony import Event, FinishReason, TextDelta, TurnDone
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.stream import CAPACITY, Stream


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


def test_unread_streams_starve_nobody() -> None:
    """Those that came first stood still, and held their places for ever."""
    runtime, _ = open_scripted(LONG, concurrent=2)
    with runtime:
        unread = [runtime.stream("Hi", sampling=GREEDY) for _ in range(3)]
        assert runtime.respond("Hi", sampling=GREEDY, max_tokens=5).usage.completion_tokens == 5
        later = runtime.stream("Hi", sampling=GREEDY)
        wait_until(lambda: later._outbox.is_full)
        assert runtime._owner._running, "nobody waits for its place, so it waits for its reader"
        assert {stream.reply().text for stream in (*unread, later)} == {"word " * 400}


ENDLESS = LONG.removesuffix("<|return|>")


def test_dropped_streams_give_everything_back() -> None:
    """Also those that were never read, and those whose turn had not begun."""
    runtime, model = open_scripted(ENDLESS, concurrent=2)
    with runtime:
        streams = [runtime.stream("Hi", sampling=GREEDY), runtime.astream("Hi", sampling=GREEDY)]
        wait_until(lambda: all(stream._outbox.is_full for stream in streams))
        streams += [runtime.stream("Hi", sampling=GREEDY), runtime.astream("Hi", sampling=GREEDY)]
        tasks = [weakref.ref(stream._outbox) for stream in streams]
        streams.clear()
        gc.collect()
        wait_until(lambda: not runtime._owner._running)
        wait_until(lambda: not any(task() for task in tasks))
        stopped = model.steps
        assert runtime.respond("Hi", sampling=GREEDY, max_tokens=5).usage.completion_tokens == 5
        assert model.steps == stopped + 5


def read_by_three(stream: Stream) -> list[list[Event]]:
    told: list[list[Event]] = [[] for _ in range(3)]
    readers = [
        threading.Thread(target=lambda mine=mine: mine.extend(stream), daemon=True) for mine in told
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert not any(reader.is_alive() for reader in readers), "it was not told of the end"
    return told


def test_several_threads_may_read_one_stream() -> None:
    """Two that took at once left the turn asleep, and all but one waited for ever at its end."""
    runtime, _ = open_scripted(LONG)
    with runtime:
        stream = runtime.stream("Hi", sampling=GREEDY)
        told = read_by_three(stream)
        text = "".join(stream.reply().text)
        events = [event for mine in told for event in mine]
        assert sum(isinstance(event, TurnDone) for event in events) == 1
        assert sum(len(e.text) for e in events if isinstance(e, TextDelta)) == len(text)
        assert stream.reply().text == "word " * 400
        closed = runtime.stream("Hi", sampling=GREEDY)
        threading.Timer(0.05, closed.close).start()
        read_by_three(closed)


def test_several_tasks_may_read_one_stream() -> None:
    runtime, _ = open_scripted(LONG)

    async def use() -> None:
        stream = runtime.astream("Hi", sampling=GREEDY)

        async def read() -> list[Event]:
            return [event async for event in stream]

        told = await asyncio.wait_for(asyncio.gather(*(read() for _ in range(3))), 30)
        assert sum(event == TurnDone(FinishReason.STOP) for mine in told for event in mine) == 1
        assert (await stream.reply()).text == "word " * 400

    with runtime:
        asyncio.run(use())


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


def test_a_stream_may_be_closed_while_another_thread_waits_for_it() -> None:
    """An app's Stop button closed the stream, and the thread that read it waited for ever."""
    model = scripted.ScriptedModel(scripted.SCRIPTS["slow"], step_s=0.05)
    with open_model(model, concurrent=1) as runtime:
        first = runtime.stream("Count.", sampling=GREEDY)
        stream = runtime.stream("Me too.", sampling=GREEDY)  # waits for the first: no event comes
        next(first)
        reader = threading.Thread(target=lambda: list(stream), daemon=True)
        reader.start()
        time.sleep(0.1)
        stream.close()
        reader.join(30)
        assert not reader.is_alive() and next(stream, None) is None


def test_a_stream_may_be_closed_while_another_task_waits_for_it() -> None:
    model = scripted.ScriptedModel(scripted.SCRIPTS["slow"], step_s=0.05)

    async def stop_waiting(runtime: Runtime) -> list[object]:
        stream = runtime.astream("Me too.", sampling=GREEDY)

        async def read() -> list[object]:
            return [event async for event in stream]

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        await stream.aclose()
        return await asyncio.wait_for(reader, 30)

    with open_model(model, concurrent=1) as runtime:
        first = runtime.stream("Count.", sampling=GREEDY)
        assert next(first) and asyncio.run(stop_waiting(runtime)) == []
