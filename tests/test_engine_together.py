"""Generations that take their steps together: each gives what it gives alone."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hash_model import (
    GREEDY,
    PROMPT,
    HashCache,
    HashModel,
    V,
    assert_cache_holds,
    engine,
    greedy,
    hash_of,
)

from mlx_gptoss.sampling import packed


class CountingModel(HashModel):
    """Notes how many rows each step had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def step_rows(self, tokens: mx.array, caches: Sequence[HashCache]) -> mx.array:
        self.rows.append(len(caches))
        return super().step_rows(tokens, caches)


def test_generations_take_their_steps_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives the tokens it gives alone; one ends early, one joins late, each merges alone."""
    monkeypatch.setattr(HashCache, "merge_every", 5)
    model = CountingModel()
    shared = engine(model)
    prompts, counts = [PROMPT, PROMPT[:4], [5, 5, 6]], [9, 6, 12]
    running = [
        shared.generate(prompt, sampling=GREEDY, max_tokens=count)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    taken: list[list[int]] = [[], [], []]
    for step in range(14):
        present = running if step > 1 else running[:2]
        shared.launch(present)
        for place, generation in enumerate(present):
            taken[place] += [token for token in [next(generation, None)] if token is not None]
    assert taken == [greedy(p, n) for p, n in zip(prompts, counts, strict=True)]
    assert max(model.rows) == 3 and sum(model.rows) == sum(counts) - 3, "no step in vain"
    for generation, prompt, tokens in zip(running, prompts, taken, strict=True):
        assert_cache_holds(generation.cache, prompt + tokens[:-1])


def test_beside_a_guided_one_all_feed_ahead_and_choose_late() -> None:
    """Its guide is asked while its token and the others' are fed, together; no step is in vain."""
    model = CountingModel()
    fed_when_asked = []

    class Even:
        def allowed(self) -> np.ndarray:
            fed_when_asked.append(sum(model.rows))
            return packed(np.arange(V) % 2 == 0)

        def accept(self, token: int) -> None:
            assert token % 2 == 0

    def even(tokens: list[int]) -> list[int]:
        """The nearest even id to what the model would say, the lower of two."""
        for _ in range(7):
            wanted = hash_of(tokens) % V
            tokens = [*tokens, min(range(0, V, 2), key=lambda id: (abs(id - wanted), id))]
        return tokens[-7:]

    shared = engine(model)
    free = shared.generate(PROMPT, sampling=GREEDY, max_tokens=9)
    guided = shared.generate(PROMPT[:4], sampling=GREEDY, max_tokens=7, guide=Even())
    taken: dict[Any, list[int]] = {free: [], guided: []}
    while any(one.finish is None for one in taken):
        shared.launch(list(taken))
        for one, tokens in taken.items():
            tokens += [token for token in [next(one, None)] if token is not None]
    assert taken == {free: greedy(PROMPT, 9), guided: even(PROMPT[:4])}
    assert fed_when_asked == [0, 2, 4, 6, 8, 10, 12] and model.rows == [2] * 6 + [1] * 2
    for one, prompt in ((free, PROMPT), (guided, PROMPT[:4])):
        assert_cache_holds(one.cache, prompt + taken[one][:-1])


@pytest.mark.parametrize("masks", [0, 3])
def test_a_fault_is_of_the_generation_that_made_it(masks: int) -> None:
    """But for a step that all took together, which fails all."""

    class Wrong:
        left = masks

        def allowed(self) -> np.ndarray:
            if not self.left:
                raise ZeroDivisionError("no mask")
            self.left -= 1
            return packed(np.ones(V))

        def accept(self, token: int) -> None: ...

    shared = engine(CountingModel())
    good = shared.generate(PROMPT, sampling=GREEDY, max_tokens=7)
    bad = shared.generate(PROMPT, sampling=GREEDY, guide=Wrong())
    taken = []
    for _ in range(masks):
        shared.launch([good, bad])
        taken.append(next(good))
        assert next(bad) == taken[-1]
    shared.launch([good, bad])
    with pytest.raises(ZeroDivisionError, match="no mask"):
        next(bad)
    assert next(bad, None) is None and taken + list(good) == greedy(PROMPT, 7)

    def broken(tokens: mx.array, caches: Sequence[HashCache]) -> mx.array:
        raise MemoryError("no room")

    pair = [shared.generate(PROMPT, sampling=GREEDY) for _ in range(2)]
    shared.model.step_rows = broken  # type: ignore[assignment]
    shared.launch(pair)
    for generation in pair:
        with pytest.raises(MemoryError, match="no room"):
            next(generation)
