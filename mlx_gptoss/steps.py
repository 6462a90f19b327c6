"""How a generation takes its decode steps: through the model, or through the compiled kernels.

Both start after the prompt, give each token from the one before without waiting for it, and can
forget the last step taken, which is how the engine stays one step ahead of the host.
"""

from typing import Protocol

import mlx.core as mx

from mlx_gptoss.cache import ModelCache, ModelSnapshot
from mlx_gptoss.decode import ROWS, Decoder, DecodeState, Decoding
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams, SamplingRows, sample


class Guide(Protocol):
    """Decides which tokens may come next; see `structured.Guide`."""

    def allowed(self) -> mx.array:
        """(V,) bool, at least one true."""
        ...

    def accept(self, token: int) -> None:
        """Note the token that was chosen."""
        ...


class Steps(Protocol):
    """The steps of one generation.

    Attributes:
        merges_next: The next step merges recent keys and values into the long stores; with nothing
            in flight, and after `let_go`, that happens in place. Also true of every guided step,
            which cannot be taken before its token is known.
    """

    @property
    def merges_next(self) -> bool:
        """See above."""
        ...

    def take(self, token: mx.array) -> mx.array:
        """Feed `token`, (1,) int32, which may still be on its way; launch and return the next."""
        ...

    def keep(self) -> None:
        """The step taken last counts: it can no longer be forgotten."""

    def let_go(self) -> None:
        """Hold no earlier state: the next step will not be forgotten."""

    def end(self) -> None:
        """Bring the cache to the last step kept."""


class ModelSteps:
    """Steps of the model's own operations, with every way of sampling.

    Args:
        model: The model.
        cache: Of the prompt; it is always up to date.
        rows: How to sample.
        allowed: (V,) bool.
        guide: Narrows it, token by token.
    """

    def __init__(
        self,
        model: Model,
        cache: ModelCache,
        *,
        rows: SamplingRows,
        allowed: mx.array,
        guide: Guide | None,
    ) -> None:
        self._guide = guide
        self._model, self._cache, self._rows, self._allowed = model, cache, rows, allowed
        self._kept: ModelSnapshot | None = cache.snapshot()

    @property
    def merges_next(self) -> bool:
        """See `Steps`."""
        return self._guide is not None or self._cache.merges_next

    def take(self, token: mx.array) -> mx.array:
        """See `Steps`."""
        return self.choose(self._model.next_logits(token[:, None], self._cache))

    def choose(self, logits: mx.array) -> mx.array:
        """Sample the token at the cache's end from (1, V) and start computing it; (1,) int32."""
        position = mx.array([self._cache.offset], dtype=mx.int32)
        allowed = self._allowed
        if self._guide is not None:
            allowed = allowed & self._guide.allowed()
        token = sample(logits, position, rows=self._rows, allowed=allowed)
        mx.async_eval(token, self._cache.arrays)
        return token

    def keep(self) -> None:
        """See `Steps`."""
        self._kept = self._cache.snapshot()

    def let_go(self) -> None:
        """See `Steps`."""
        self._kept = None

    def end(self) -> None:
        """See `Steps`."""
        if self._kept is not None:
            self._cache.restore(self._kept)


class KernelSteps:
    """Steps of the compiled decode function; the cache is brought up to date at merges and the end.

    Args:
        decoder: The model's.
        cache: Of the prompt.
        sampling: With a seed; no top-k, top-p or min-p.
    """

    def __init__(self, decoder: Decoder, cache: ModelCache, *, sampling: SamplingParams) -> None:
        self._decoder, self._cache, self._sampling = decoder, cache, sampling
        self._decoding: Decoding | None = None
        self._kept: DecodeState | None = None

    @staticmethod
    def can_sample(sampling: SamplingParams) -> bool:
        """Whether the step can choose tokens this way on the device."""
        return sampling.top_p >= 1 and sampling.top_k is None and not sampling.min_p

    @property
    def merges_next(self) -> bool:
        """See `Steps`."""
        return self._decoding is not None and self._decoding.state.slot == ROWS

    def take(self, token: mx.array) -> mx.array:
        """See `Steps`; after the first step `token` must be the one returned last."""
        if self._decoding is None:
            self._decoding = self._decoder.start(
                self._cache,
                token,
                temperatures=[self._sampling.temperature],
                seeds=[self._sampling.seed or 0],
            )
        self._kept = self._decoding.advance()
        return self._decoding.state.token

    def keep(self) -> None:
        """See `Steps`."""
        self._kept = None

    def let_go(self) -> None:
        """See `Steps`."""
        self._kept = None

    def end(self) -> None:
        """See `Steps`."""
        if self._decoding is not None:
            self._decoding.finish(self._kept or self._decoding.state)
