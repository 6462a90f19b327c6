"""How generations take their decode steps: through the model, or through the compiled kernels.

Both start after the prompt, give each token from the one before without waiting for it, and can
forget the last step taken, which is how the engine stays one step ahead of the host. Where a guide
must see a token to say which may follow, that token is fed ahead, and the next one chosen later.
The steps of several generations are taken together; none depends on who else is there, see
`kernels.batches`.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import ModelCache, ModelSnapshot
from mlx_gptoss.decode import Decoder
from mlx_gptoss.decode_state import ROWS, Decoding
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams, SamplingRows, packed, sample, unpacked


class Guide(Protocol):
    """Decides which tokens may come next; see `structured.Guide`."""

    def allowed(self) -> npt.NDArray[np.uint32]:
        """Bits as in `sampling.packed`, at least one of them set."""
        ...

    def accept(self, token: int) -> None:
        """Note the token that was chosen."""
        ...


class Steps(Protocol):
    """The steps of one generation."""

    @property
    def waits(self) -> bool:
        """Whether the next token must not be fed before the host has it.

        So it is where recent keys and values are merged into the long stores, which with nothing in
        flight, after `ready`, happens in place.
        """
        ...

    @classmethod
    def take(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> list[mx.array]:
        """Take one step of each of several generations together, and launch it.

        Args:
            steps: Of the generations.
            tokens: What to feed to each, (1,) int32, which may still be on its way.

        Returns:
            The next token of each, (1,) int32.
        """
        ...

    @classmethod
    def feed(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> None:
        """Launch what a step can do without its guide; `take` of the same tokens does the rest.

        Args:
            steps: Of the generations.
            tokens: As of `take`.
        """
        ...

    def ready(self) -> None:
        """The host has the token to feed, or fed: hold no earlier state, see what may follow."""

    def keep(self) -> None:
        """The step taken last counts: it can no longer be forgotten."""

    def end(self) -> list[mx.array]:
        """Bring the cache to the last step kept; returns what to hold until later work is done."""
        ...


class ModelSteps:
    """Steps of the model's own operations, with every way of sampling.

    Args:
        model: The model.
        cache: Of the prompt; it is always up to date.
        sampling: With a seed.
        allowed: (V,), true for ids that may be sampled.
        guide: Narrows it, token by token.
    """

    def __init__(
        self,
        model: Model,
        cache: ModelCache,
        *,
        sampling: SamplingParams,
        allowed: npt.NDArray[np.bool_],
        guide: Guide | None,
    ) -> None:
        self._model, self._cache, self._guide = model, cache, guide
        self._rows = SamplingRows.pack([sampling])
        self._every = packed(allowed)
        self._allowed = unpacked(mx.array(self._every), allowed.size)
        self._kept: ModelSnapshot | None = None
        self._logits: mx.array | None = None  # after a token fed, (1, V)
        self.ready()

    @property
    def waits(self) -> bool:
        """See `Steps`."""
        return self._cache.merges_next

    @classmethod
    def take(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> list[mx.array]:
        """See `Steps`."""
        pairs = zip(steps, tokens, strict=True)
        late = [(one, token) for one, token in pairs if one._logits is None]
        cls._run([one for one, _ in late], [token for _, token in late])
        chosen = [one._choose() for one in steps]
        mx.async_eval(chosen, [one._cache.arrays for one in steps])
        return chosen

    @classmethod
    def feed(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> None:
        """See `Steps`."""
        cls._run(steps, tokens)
        mx.async_eval([(one._logits, one._cache.arrays) for one in steps])

    @classmethod
    def _run(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> None:
        if not steps:
            return
        caches = [one._cache for one in steps]
        logits = steps[0]._model.step_rows(mx.concatenate(list(tokens)), caches)
        for one, row in zip(steps, mx.split(logits, len(steps)), strict=True):
            one._logits = row

    def first(self, logits: mx.array) -> mx.array:
        """Sample the token after the prompt from (1, V) and launch that; (1,) int32."""
        self._logits = logits
        token = self._choose()
        mx.async_eval(token)
        self.keep()
        return token

    def _choose(self) -> mx.array:
        logits, self._logits = self._logits, None
        assert logits is not None
        # Row by row: a row that sorts its logits may break ties otherwise than one that does not.
        position = mx.array([self._cache.offset], dtype=mx.int32)
        return sample(logits, position, rows=self._rows, allowed=self._allowed)

    def ready(self) -> None:
        """See `Steps`."""
        self._kept = None
        if self._guide is not None:
            bits = mx.array(self._every & self._guide.allowed())
            self._allowed = unpacked(bits, self._allowed.size)

    def keep(self) -> None:
        """See `Steps`."""
        self._kept = self._cache.snapshot()

    def end(self) -> list[mx.array]:
        """See `Steps`."""
        if self._kept is not None:
            self._cache.restore(self._kept)
        if self._logits is None:
            return []
        # The logits are a view of the batch's; a product that waits for them has its own buffer.
        one_of_them = self._logits[:, :1] * 1
        mx.async_eval(one_of_them)
        return [one_of_them]


class KernelSteps:
    """Steps of the compiled decode function; the cache is brought up to date at merges and the end.

    Args:
        decoder: The model's.
        cache: Of the prompt.
        sampling: With a seed.
        guide: Narrows what the decoder allows, token by token.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: ModelCache,
        *,
        sampling: SamplingParams,
        guide: Guide | None,
    ) -> None:
        self._decoder, self._cache, self._sampling = decoder, cache, sampling
        self._guide = guide
        self._allowed: npt.NDArray[np.uint32] | None = None  # by the guide
        self._decoding: Decoding | None = None

    @property
    def waits(self) -> bool:
        """See `Steps`."""
        return self._decoding is not None and self._decoding.state.slot == ROWS

    @classmethod
    def take(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> list[mx.array]:
        """See `Steps`; after the first step a token must be the one returned last."""
        decodings = [one._begun(token) for one, token in zip(steps, tokens, strict=True)]
        steps[0]._decoder.advance(decodings)
        return [decoding.state.token for decoding in decodings]

    @classmethod
    def feed(cls, steps: Sequence[Self], tokens: Sequence[mx.array]) -> None:
        """See `Steps`; the tokens are as of `take`."""
        decodings = [one._begun(token) for one, token in zip(steps, tokens, strict=True)]
        steps[0]._decoder.feed(decodings)

    def _begun(self, token: mx.array) -> Decoding:
        if self._decoding is None:
            self._decoding = self._decoder.start(self._cache, token, sampling=[self._sampling])
        self._decoding.allowed = self._allowed
        return self._decoding

    def ready(self) -> None:
        """See `Steps`."""
        if self._guide is not None:
            self._allowed = self._guide.allowed()

    def keep(self) -> None:
        """See `Steps`."""
        if self._decoding is not None:
            self._decoding.keep()

    def end(self) -> list[mx.array]:
        """See `Steps`."""
        if self._decoding is not None:
            self._decoding.finish()
        return []
