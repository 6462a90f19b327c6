"""Real models that note what they are fed, in which pieces, and the logits after a prompt."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import scripted
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.harmony import Message, render_message
from mlx_gptoss.model import Model
from mlx_gptoss.vocabulary import N_VOCAB

FOLD = 1024  # ids of the real vocabulary stand for those of the tiny model, modulo this
REASONING = "<|channel|>analysis<|message|>Hm {}<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{{"at":{}}}<|call|>'
ANSWER = "<|channel|>final<|message|>So {}<|return|>"
HEADER = 2  # <|start|>assistant
Route = list[tuple[int, list[int]]]  # what was fed, by position


class WatchedModel:
    """Computes a model.

    Attributes:
        before: What made the cache that an earlier process left, if one is continued.
        last: What made the cache that was fed last.
        first: The route and the (V,) logits at the end of the last prompt.
    """

    def __init__(self, model: Model):
        self.config: Any = model.config
        self.dtype = model.dtype
        self.model, self.kernels, self.make_cache = model, model.kernels, model.make_cache
        self.before: Route = []
        self.last: Route = []
        self.first: tuple[Route, np.ndarray] = ([], np.zeros(0))
        self._routes: dict[int, Route] = {}

    def hidden(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        self._note(tokens, cache)
        return self.model.hidden(tokens, cache)

    def next_logits(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        self._note(tokens, cache)
        logits = self.model.next_logits(tokens, cache)
        if tokens.shape[1] > 1:
            self.first = list(self._routes[id(cache)]), np.array(logits[0])
        return logits

    def step_rows(self, tokens: mx.array, caches: Sequence[ModelCache]) -> mx.array:
        for token, cache in zip(tokens[:, None, None], caches, strict=True):
            self._note(token, cache)
        return self.model.step_rows(tokens, caches)

    def _note(self, tokens: mx.array, cache: ModelCache) -> None:
        before = self._routes.get(id(cache), self.before)
        before = [piece for piece in before if piece[0] < cache.offset]
        self.last = self._routes[id(cache)] = [*before, (cache.offset, tokens[0].tolist())]


class GivenModel(WatchedModel):
    """Computes a tiny model, and says what it is told to.

    Attributes:
        script: What is written after each prompt.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        self.config = SimpleNamespace(vocab_size=N_VOCAB, max_position_embeddings=131_072)
        self.script = ""

    def hidden(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        return super().hidden(tokens % FOLD, cache)

    def next_logits(self, tokens: mx.array, cache: ModelCache) -> mx.array:
        super().next_logits(tokens % FOLD, cache)
        if tokens.shape[1] > 1:
            self._start = cache.offset
        return self._told(cache)

    def step_rows(self, tokens: mx.array, caches: Sequence[ModelCache]) -> mx.array:
        super().step_rows(tokens % FOLD, caches)
        return mx.concatenate([self._told(cache) for cache in caches])

    def _told(self, cache: ModelCache) -> mx.array:
        """(1, V) logits of what the script says at the cache's end."""
        script = scripted.tokens_of(self.script)
        token = script[min(cache.offset - self._start, len(script) - 1)]
        return mx.where(mx.arange(N_VOCAB) == token, 100.0, 0.0)[None]


def new_model() -> Model:
    return tiny_model(TinyShape(layers=2))


def cold(model: Model, route: Route) -> tuple[np.ndarray, np.ndarray]:
    """(V,) logits after a route, fed anew piece by piece, and fed at once."""
    cache = model.make_cache()
    for _, piece in route[:-1]:
        model.hidden(mx.array([piece]), cache)
    last = model.next_logits(mx.array([route[-1][1]]), cache)
    whole = [token for _, piece in route for token in piece]
    return np.array(last[0]), np.array(model.next_logits(mx.array([whole]))[0])


def size(*messages: Message) -> int:
    return sum(len(render_message(message)) for message in messages)
