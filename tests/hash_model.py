"""A stand-in for the engine's model whose next token depends on every token fed, in order."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_gptoss.engine import Engine
from mlx_gptoss.kernels.selection import all_definitions
from mlx_gptoss.sampling import SamplingParams

V, CONTEXT = 53, 400
GREEDY = SamplingParams(temperature=0)
PROMPT = [7, 1, 30, 2, 2, 51, 9, 44, 0, 13]


class HashCache:
    """Holds a running hash of the tokens fed: feeding one twice, or none, changes what follows."""

    merge_every = 0  # tokens; 0 never merges

    @property
    def merges_next(self) -> bool:
        return bool(self.merge_every) and self.offset % self.merge_every == 0

    def __init__(self) -> None:
        self.offset, self.state = 0, mx.array([1], dtype=mx.int32)

    @property
    def arrays(self) -> list[mx.array]:
        return [self.state]

    def snapshot(self) -> tuple[int, mx.array]:
        return self.offset, self.state

    def restore(self, snapshot: tuple[int, mx.array]) -> None:
        self.offset, self.state = snapshot


class HashModel:
    """The engine's view of a model; counts what it was fed and how far ahead of the host."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=V, max_position_embeddings=CONTEXT)
        self.kernels = all_definitions("a stand-in has none")
        self.fed: list[int] = []  # tokens per call

    def make_cache(self) -> HashCache:
        return HashCache()

    def hidden(self, tokens: mx.array, cache: HashCache) -> None:
        self.fed.append(tokens.shape[1])
        for i in range(tokens.shape[1]):
            cache.state = (cache.state * 31 + tokens[:, i] + 1) % 9973
        cache.offset += tokens.shape[1]

    def next_logits(self, tokens: mx.array, cache: HashCache) -> mx.array:
        self.hidden(tokens, cache)
        distance = mx.abs(mx.arange(V)[None] - (cache.state % V)[:, None])
        return -0.4 * distance.astype(mx.float32)

    def step_rows(self, tokens: mx.array, caches: Sequence[HashCache]) -> mx.array:
        rows = zip(tokens, caches, strict=True)
        return mx.concatenate([self.next_logits(token[None, None], cache) for token, cache in rows])


def hash_of(tokens: Iterable[int]) -> int:
    state = 1
    for token in tokens:
        state = (state * 31 + token + 1) % 9973
    return state


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What must come out, computed without an engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(hash_of(tokens) % V)
    return tokens[len(prompt) :]


def engine(model: HashModel | None = None, **options: Any) -> Engine:
    return Engine(model or HashModel(), **options)  # type: ignore[arg-type]


def assert_cache_holds(cache: Any, tokens: list[int]) -> None:
    assert (cache.offset, cache.state.item()) == (len(tokens), hash_of(tokens))
