"""Many threads and tasks at once: the tokens of each alone, no deadlock, no leak."""

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import harmony_engine
from mlx_gptoss.vocabulary import N_VOCAB

SHAPE = TinyShape(layers=2, hidden=64, inter=32, q_heads=4, experts=4, chosen=2)
MOST_GROWTH_BYTES = 24 * 2**20  # the process's heap moves by as much; 400 leaks are more


class FoldedModel:
    """A real tiny model whose 1024 ids stand for the whole vocabulary."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=N_VOCAB, max_position_embeddings=131_072)
        self._model = tiny_model(SHAPE)
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
WORKERS, TURNS = 8, 50


@pytest.fixture(scope="module")
def alone(shared: Runtime) -> list[list[int]]:
    return [sampled(shared.respond(t, sampling=s, max_tokens=n)) for t, s, n in REQUESTS]


class Watch:
    """What went wrong, and the memory of the process after each turn that one worker finished."""

    def __init__(self, alone: list[list[int]]) -> None:
        self._alone, self.wrong = alone, list[Any]()
        self._sizes: list[int] = []

    def check(self, worker: int, place: int, reply: Any) -> None:
        if sampled(reply) != self._alone[place]:
            self.wrong.append((worker, place))
        if worker == 0:
            self._sizes.append(rss_bytes())

    def assert_flat(self) -> None:
        """The first half of the turns warms up."""
        middle = len(self._sizes) // 2
        warm, after = max(self._sizes[:middle]), max(self._sizes[middle:])
        assert after < warm + MOST_GROWTH_BYTES, f"{(after - warm) / 2**20:.0f} MiB more"


def test_threads_get_what_they_get_alone_and_nothing_leaks(
    shared: Runtime, alone: list[list[int]]
) -> None:
    """8 threads, 50 short requests each, a third of them cancelled at a random moment."""
    watch = Watch(alone)

    def work(worker: int) -> None:
        rng = random.Random(worker)
        for _ in range(TURNS):
            place = rng.randrange(len(REQUESTS))
            text, sampling, tokens = REQUESTS[place]
            stream = shared.stream(text, sampling=sampling, max_tokens=tokens)
            if rng.random() < 1 / 3:
                if rng.random() < 0.5:
                    next(stream, None)
                stream.close()
                continue
            watch.check(worker, place, stream.reply())

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive(), "deadlock"
    assert not watch.wrong and not shared._owner._waiting
    watch.assert_flat()


def test_tasks_get_what_they_get_alone_and_nothing_leaks(
    shared: Runtime, alone: list[list[int]]
) -> None:
    """The same in one event loop, where the task that waits is cancelled, too."""
    watch = Watch(alone)

    async def work(worker: int) -> None:
        rng = random.Random(100 + worker)
        for _ in range(TURNS):
            place = rng.randrange(len(REQUESTS))
            text, sampling, tokens = REQUESTS[place]
            if rng.random() < 1 / 3:
                turn = shared.arespond(text, sampling=sampling, max_tokens=tokens)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(turn, rng.random() / 20)
                continue
            async with shared.astream(text, sampling=sampling, max_tokens=tokens) as stream:
                if rng.random() < 0.2:
                    await anext(stream, None)
                    continue
                watch.check(worker, place, await stream.reply())

    async def together() -> None:
        await asyncio.wait_for(asyncio.gather(*(work(n) for n in range(WORKERS))), 240)

    asyncio.run(together())
    assert not watch.wrong
    watch.assert_flat()
