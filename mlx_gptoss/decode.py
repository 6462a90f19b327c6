"""Decodes by a step of fixed shapes, compiled once, made of our kernels.

A custom kernel costs 30 to 50 microseconds of Python each time it is called, and a step has 159 of
them on the 20b; so the step is traced once by `mx.compile` and replayed; see `decode_step`.

A guide must see a token to know which may follow. The layers need the token alone; so they are
launched ahead, the choice once the guide has spoken, and its time passes while they run.

Keys and values: `frozen` segments are only read; the step returns new `append` segments of `ROWS`
rows, so MLX never copies more than those while a step is in flight. When they are full, `Decoding`
merges them into the cache. A step computed ahead is dropped by going on from the state before it.

A batch is any generations, each with its own cache: the weights are read once for all rows, and
each attends over its own frozen segments. Up to `kernels.batches.EXACT_ROWS` rows, a row's bits
depend on nothing but itself; of more, the last ones also on how many there are.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.decode_state import Decoding, StepArrays, joined
from mlx_gptoss.decode_step import DecodeStep
from mlx_gptoss.decode_weights import Weights, arrays_of, weights_of
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams, packed

MOST_TRACES = 64  # of one compiled function, which keeps them all: one for each set of shapes


class Decoder:
    """The step of one model.

    Args:
        model: whose weights it reads; they are arguments of the compiled function, not constants,
            and should be evaluated: what is lazy is computed again in every step.
        kernels: what runs each operation.
        allowed: (V,), true for ids that may be sampled.
    """

    def __init__(self, model: Model, *, kernels: KernelSet, allowed: npt.ArrayLike):
        self.model, self.step = model, DecodeStep(model, kernels)
        self.weights = weights_of(model)
        self._allowed = packed(allowed)
        self._masks: dict[int, mx.array] = {}
        self._head = {name: self.weights[name] for name in ("norm", "unembedding")}
        self._forgotten = 0  # traces
        self._compiled = _Compiled(self.step)
        self._together: weakref.WeakSet[Decoding] = weakref.WeakSet()  # of the last step

    @property
    def traces(self) -> int:
        """How many sets of shapes the step was traced for."""
        return self.step.traces

    def looked_up(self, token: mx.array) -> tuple[mx.array, Weights]:
        """Which rows of which embedding a step reads: of the whole, or of one made for it."""
        table = self.model.embedding
        if isinstance(table, Matrix):
            return token, self.weights
        rows = arrays_of(table.rows(token))
        return mx.arange(token.size, dtype=mx.int32), self.weights | {"embedding": rows}

    def allowed(self, rows: int) -> mx.array:
        """What so many rows may sample without a guide, (rows, V/32) uint32."""
        if rows not in self._masks:
            self._masks[rows] = mx.array(np.tile(self._allowed, (rows, 1)))
        return self._masks[rows]

    def _allowed_to(self, decodings: Sequence[Decoding]) -> mx.array:
        """What each row may sample; the shape is the same whether guides say less or not."""
        if all(one.allowed is None for one in decodings):
            return self.allowed(sum(one.state.count for one in decodings))
        rows = [
            self._allowed if one.allowed is None else self._allowed & one.allowed
            for one in decodings
            for _ in range(one.state.count)
        ]
        return mx.array(np.stack(rows))

    def start(
        self,
        cache: ModelCache,
        token: mx.array,
        *,
        sampling: Sequence[SamplingParams],
    ) -> Decoding:
        """Begin to decode after a prompt.

        Args:
            cache: holds the prompt but for its last token, without padding; `Decoding` extends it.
            token: (R,) int32, the token to feed first to each row of the cache.
            sampling: of each row, with a seed.

        Raises:
            CacheError: rows of the cache are padded.
        """
        return Decoding(
            cache, token, config=self.model.config, dtype=self.model.dtype, sampling=sampling
        )

    def advance(self, decodings: Sequence[Decoding]) -> None:
        """Launch the next step of several generations together; each can still drop it.

        Args:
            decodings: different ones, of this decoder; they may be others in every step.
        """
        decodings = self._gathered(decodings)
        late = [one for one in decodings if not one.is_fed]
        # Beside a guide the parts are taken even where none was fed ahead, as before a merge: the
        # whole would be traced for that step alone.
        if len(late) == len(decodings) and all(one.allowed is None for one in decodings):
            _launch(decodings, self._stepped(decodings))
            return
        if late:
            _launch(late, self._fed(late))
        _launch(decodings, self._chosen(decodings))

    def feed(self, decodings: Sequence[Decoding]) -> None:
        """Launch the layers of the next step of several generations; `advance` ends it.

        Args:
            decodings: see `advance`; none is fed already.
        """
        decodings = self._gathered(decodings)
        _launch(decodings, self._fed(decodings))

    def _gathered(self, decodings: Sequence[Decoding]) -> list[Decoding]:
        """Those of a step in the order of its rows, each with room for one more."""
        if self.traces - self._forgotten >= MOST_TRACES:
            self._compiled, self._forgotten = _Compiled(self.step), self.traces
        # Batches that differ in order alone would be traced anew.
        decodings = sorted(decodings, key=lambda one: one.capacity)
        for one in decodings:
            one.make_room()
        for left in self._together - set(decodings):
            left.stand_alone()
        self._together = weakref.WeakSet(decodings)
        return decodings

    def _stepped(self, decodings: Sequence[Decoding]) -> StepArrays:
        batch = joined([one.state for one in decodings])
        token, weights = self.looked_up(batch.token)
        (token, control, logprob), append = self._compiled.step[_filtered(decodings)](
            [one.frozen for one in decodings],
            batch.append,
            token,
            batch.control,
            batch.sampling,
            self._allowed_to(decodings),
            weights,
        )
        return replace(batch, token=token, control=control, logprob=logprob, append=append)

    def _fed(self, decodings: Sequence[Decoding]) -> StepArrays:
        batch = joined([one.state for one in decodings])
        token, weights = self.looked_up(batch.token)
        hidden, append = self._compiled.layers(
            [one.frozen for one in decodings], batch.append, token, batch.control, weights
        )
        return replace(batch, hidden=hidden, append=append)

    def _chosen(self, decodings: Sequence[Decoding]) -> StepArrays:
        batch = joined([one.state for one in decodings])
        token, control, logprob = self._compiled.choose[_filtered(decodings)](
            batch.hidden,
            batch.control,
            batch.sampling,
            self._allowed_to(decodings),
            self._head,
        )
        return replace(batch, token=token, control=control, logprob=logprob, hidden=None)


class _Compiled:
    """The functions of a step, whole and in its two parts."""

    def __init__(self, step: DecodeStep):
        self.step, self.choose = _with_filters(step), _with_filters(step.choose)
        self.layers = mx.compile(step.layers)


def _with_filters(function: Callable[..., Any]) -> dict[bool, Callable[..., Any]]:
    """Without and with filters: a batch without any skips `sample_filtered`'s passes."""
    return {
        filtered: mx.compile(partial(function, filtered=filtered)) for filtered in (False, True)
    }


def _filtered(decodings: Sequence[Decoding]) -> bool:
    return any(one.filtered for one in decodings)


def _launch(decodings: Sequence[Decoding], after: StepArrays) -> None:
    """Start to compute what follows the states of a batch, and go on to it."""
    first = 0
    for one in decodings:
        one.step_to(after, first)
        first += one.state.count
    mx.async_eval(after.arrays, [one.state.token for one in decodings])
