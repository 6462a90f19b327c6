"""Decodes by a step of fixed shapes, compiled once, made of our kernels.

A custom kernel costs 30 to 50 microseconds of Python each time it is called, and a step has 159 of
them on the 20b; so the step is traced once by `mx.compile` and replayed; see `decode_step`.

Keys and values: `frozen` segments are only read; the step returns new `append` segments of `ROWS`
rows, so MLX never copies more than those while a step is in flight. When they are full, `Decoding`
merges them into the cache. A step computed ahead is dropped by going on from the state before it.

A batch is any generations, each with its own cache: the weights are read once for all rows, and
each attends over its own frozen segments. The rows of a batch depend on nothing but themselves.
"""

import weakref
from collections.abc import Callable, Sequence
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
        self._forgotten = 0  # traces
        self._compiled = _compiled(self.step)
        self._together: weakref.WeakSet[Decoding] = weakref.WeakSet()  # of the last step

    @property
    def traces(self) -> int:
        """How many sets of shapes the step was traced for."""
        return self.step.traces

    def _fed(self, token: mx.array) -> tuple[mx.array, Weights]:
        """Which rows of which embedding a step reads: of the whole, or of one made for it."""
        table = self.model.embedding
        if isinstance(table, Matrix):
            return token, self.weights
        rows = arrays_of(table.rows(token))
        return mx.arange(token.size, dtype=mx.int32), self.weights | {"embedding": rows}

    def allowed(self, rows: int) -> mx.array:
        """What may be sampled by so many rows, (rows, V/32) uint32."""
        if rows not in self._masks:
            self._masks[rows] = mx.array(np.tile(self._allowed, (rows, 1)))
        return self._masks[rows]

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
        if self.traces - self._forgotten >= MOST_TRACES:
            self._compiled, self._forgotten = _compiled(self.step), self.traces
        # Batches that differ in order alone would be traced anew.
        decodings = sorted(decodings, key=lambda one: one.capacity)
        for one in decodings:
            one.make_room()
        for left in self._together - set(decodings):
            left.stand_alone()
        self._together = weakref.WeakSet(decodings)
        batch = joined([one.state for one in decodings])
        fed, weights = self._fed(batch.token)
        filtered = any(one.filtered for one in decodings)
        (token, control, logprob), append = self._compiled[filtered](
            [one.frozen for one in decodings],
            batch.append,
            fed,
            batch.control,
            batch.sampling,
            self.allowed(batch.token.size),
            weights,
        )
        after = StepArrays(
            token=token,
            control=control,
            logprob=logprob,
            sampling=batch.sampling,
            append=append,
        )
        first = 0
        for one in decodings:
            one.step_to(after, first)
            first += one.state.count
        mx.async_eval(after.arrays, [one.state.token for one in decodings])


def _compiled(step: Callable[..., Any]) -> dict[bool, Callable[..., Any]]:
    """The step without and with filters: a batch without any skips `sample_filtered`'s passes."""
    return {filtered: mx.compile(partial(step, filtered=filtered)) for filtered in (False, True)}
