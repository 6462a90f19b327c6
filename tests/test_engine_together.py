"""Generations that take their steps together: each gives what it gives alone."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hash_model import GREEDY, PROMPT, HashCache, HashModel, assert_cache_holds, engine, greedy


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


def test_a_fault_is_of_the_generation_that_made_it() -> None:
    """But for a step that all took together, which fails all."""

    class Wrong:
        def allowed(self) -> np.ndarray:
            raise ZeroDivisionError("no mask")

        def accept(self, token: int) -> None: ...

    shared = engine(CountingModel())
    good = shared.generate(PROMPT, sampling=GREEDY, max_tokens=5)
    bad = shared.generate(PROMPT, sampling=GREEDY, guide=Wrong())
    shared.launch([good, bad])
    with pytest.raises(ZeroDivisionError, match="no mask"):
        next(bad)
    assert next(bad, None) is None and list(good) == greedy(PROMPT, 5)

    def broken(tokens: mx.array, caches: Sequence[HashCache]) -> mx.array:
        raise MemoryError("no room")

    pair = [shared.generate(PROMPT, sampling=GREEDY) for _ in range(2)]
    shared.model.step_rows = broken  # type: ignore[assignment]
    shared.launch(pair)
    for generation in pair:
        with pytest.raises(MemoryError, match="no room"):
            next(generation)
