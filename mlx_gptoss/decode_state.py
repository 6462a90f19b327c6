"""What a decode step leaves for the next one: arrays of a batch, in which each generation has rows.

A generation builds on frozen segments of its own, and merges its rows into them when they are full.
A batch that stays together passes its arrays on as they are. Where generations come or go, the rows
of those that stay are joined anew; that copies append segments, which are short, and no cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import FullCache, ModelCache, Segment
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.errors import CacheError
from mlx_gptoss.sampling import SamplingParams

ROWS = 128  # of an append segment: 0.25% of a token's bytes are copied, one merge in 128 tokens


@dataclass(frozen=True, kw_only=True)
class StepArrays:
    """Arrays of B rows, made by one step or joined from several.

    Attributes:
        token: (B,) int32, sampled, not yet fed.
        control: (B, 8) int32: position, base, slot, seed low, seed high.
        logprob: (B,) float32 of `token`, at temperature 1.
        sampling: (B, 8) float32: temperature, top-k, top-p, min-p.
        append: keys and values since each row's last merge, (B, Hkv, ROWS, 64) each, per layer.
        hidden: (B, D), the residual stream after the layers, where `token` was fed to them. Its
            keys and values are in `append` then, and `control` is as before.
    """

    token: mx.array
    control: mx.array
    logprob: mx.array
    sampling: mx.array
    append: list[Segment]
    hidden: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate, and to keep until a later step has been waited for."""
        made = [self.token, self.control, self.logprob, *(a for pair in self.append for a in pair)]
        return made if self.hidden is None else [*made, self.hidden]

    def map(self, change: Callable[[mx.array], mx.array]) -> "StepArrays":
        """The same with every array changed."""
        return StepArrays(
            token=change(self.token),
            control=change(self.control),
            logprob=change(self.logprob),
            sampling=change(self.sampling),
            append=[(change(keys), change(values)) for keys, values in self.append],
            hidden=None if self.hidden is None else change(self.hidden),
        )


@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """The state of one generation: its rows of what a step left.

    Attributes:
        step: of the whole batch.
        first: of its rows.
        count: of its rows.
        slot: rows of its append segments in use.
        token: (count,) int32, its rows of the step's.
    """

    step: StepArrays
    first: int
    count: int
    slot: int
    token: mx.array

    @classmethod
    def of(cls, step: StepArrays, *, first: int, count: int, slot: int) -> "DecodeState":
        """The state of rows `first` to `first + count` of a step."""
        token = step.token[first : first + count]
        return cls(step=step, first=first, count=count, slot=slot, token=token)

    @property
    def rows(self) -> StepArrays:
        """Its rows alone: views, or the step itself where it has no others."""
        if self.count == self.step.token.size:
            return self.step
        return self.step.map(lambda a: a[self.first : self.first + self.count])

    def copied(self) -> "DecodeState":
        """The same state in arrays of its own, which hold no other rows in memory."""
        if self.count == self.step.token.size:
            return self
        # A product has a buffer of its own; mx.contiguous would keep the batch's.
        own = self.rows.map(lambda a: a * 1)
        mx.async_eval(own.arrays, own.sampling)
        return DecodeState.of(own, first=0, count=self.count, slot=self.slot)


def joined(states: Sequence[DecodeState]) -> StepArrays:
    """The rows of several generations as one batch, in their order; all are fed, or none."""
    step, firsts = states[0].step, accumulate((s.count for s in states), initial=0)
    follows = [
        s.step is step and s.first == first for s, first in zip(states, firsts, strict=False)
    ]
    if all(follows) and sum(s.count for s in states) == step.token.size:
        return step
    parts = [state.rows for state in states]

    def join(arrays: Sequence[mx.array]) -> mx.array:
        return mx.concatenate(list(arrays))

    segments = zip(*(part.append for part in parts), strict=True)
    hidden = [part.hidden for part in parts if part.hidden is not None]
    return StepArrays(
        token=join([part.token for part in parts]),
        control=join([part.control for part in parts]),
        logprob=join([part.logprob for part in parts]),
        sampling=join([part.sampling for part in parts]),
        append=[(join([k for k, _ in s]), join([v for _, v in s])) for s in segments],
        hidden=join(hidden) if hidden else None,
    )


class Decoding:
    """One generation: its newest state, and the frozen segments that it builds on.

    Args: as `Decoder.start`, which makes it; sizes and type are the model's.

    Attributes:
        state: the newest state; its token is not fed yet.
        frozen: keys and values of each layer up to the last merge.
        filtered: some row has a top-k, top-p or min-p.
        allowed: (V/32,) uint32, see `sampling.packed`: of what its rows may sample next, all that a
            guide lets them; None where there is no guide.
    """

    def __init__(
        self,
        cache: ModelCache,
        token: mx.array,
        *,
        config: ModelConfig,
        dtype: mx.Dtype,
        sampling: Sequence[SamplingParams],
    ):
        if cache.start is not None:
            raise CacheError(
                f"cache: expected rows without padding, got {list(cache.left_padding)} tokens of "
                "it; the compiled step takes rows of any length, each with a cache of its own"
            )
        self._cache = cache
        self._previous: DecodeState | None = None
        self.allowed: npt.NDArray[np.uint32] | None = None
        count = token.size
        self.frozen = _frozen(cache)
        self.filtered = any(map(_filters, sampling))
        at = cache.offset
        rows = [[at, at, 0, *_words(params.seed or 0), 0, 0, 0] for params in sampling]
        shape = (count, config.num_key_value_heads, ROWS, config.head_dim)
        step = StepArrays(
            token=token.astype(mx.int32),
            control=mx.array(rows, dtype=mx.int32),
            logprob=mx.zeros((count,)),
            sampling=mx.array([_columns(params) for params in sampling], mx.float32),
            append=[(mx.zeros(shape, dtype), mx.zeros(shape, dtype)) for _ in config.layer_types],
        )
        self.state = DecodeState.of(step, first=0, count=count, slot=0)
        mx.eval(step.arrays)

    @property
    def capacity(self) -> int:
        """Positions of the longest frozen segment."""
        return max(keys.shape[2] for keys, _ in self.frozen)

    @property
    def is_fed(self) -> bool:
        """Whether the layers of the next step were taken already."""
        return self.state.step.hidden is not None

    def step_to(self, step: StepArrays, first: int) -> None:
        """Go on to this generation's rows of a step, and keep the state before it.

        Where only the layers were taken there is nothing to keep: they add rows beyond the slot.
        """
        state, slot = self.state, self.state.slot
        if step.hidden is None:
            self._previous, slot = state, slot + 1
        self.state = DecodeState.of(step, first=first, count=state.count, slot=slot)

    def keep(self) -> None:
        """The last step counts: it can no longer be dropped."""
        self._previous = None

    def finish(self) -> None:
        """Drop the last step unless it was kept, and bring the cache to the state before it.

        The cache then holds every token fed before that state, and not the state's own.
        """
        self.state = self._previous or self.state
        self._merge()
        self.frozen = []

    def make_room(self) -> None:
        """Merge if the append segments are full, after everything in flight is done."""
        if self.state.slot == ROWS:
            self._merge()

    def stand_alone(self) -> None:
        """Let go of the arrays of a batch that goes on without this generation."""
        self.state = self.state.copied()
        self._previous = self._previous and self._previous.copied()

    def _merge(self) -> None:
        """Move the append rows into the cache."""
        slot, count, rows = self.state.slot, self.state.count, self.state.rows
        mx.synchronize()  # a buffer that a step still reads would be copied instead of reused
        self.frozen = []
        if slot:
            for layer, (keys, values) in zip(self._cache, rows.append, strict=True):
                layer.extend(keys[:, :, :slot], values[:, :, :slot])
                mx.eval(layer.arrays)  # one layer at a time: at most one buffer is copied
        self.frozen = _frozen(self._cache)
        position, rest = rows.control[:, :1], rows.control[:, 3:]
        control = mx.concatenate([position, position, mx.zeros_like(position), rest], axis=1)
        self.state = DecodeState.of(replace(rows, control=control), first=0, count=count, slot=0)
        mx.eval(control)


def _frozen(cache: ModelCache) -> list[Segment]:
    segments = [a.freeze() if isinstance(a, FullCache) else a.arrays for a in cache]
    mx.eval(segments)
    return segments


def _filters(params: SamplingParams) -> bool:
    """Whether a top-k, top-p or min-p can change what is drawn."""
    return params.temperature > 0 and (
        params.top_k is not None or params.top_p < 1 or bool(params.min_p)
    )


def _columns(params: SamplingParams) -> list[float]:
    """A row of `kernels.sample_filtered`'s `sampling`; a greedy row needs no filter."""
    if not _filters(params):
        return [params.temperature, 0, 1, 0, 0, 0, 0, 0]
    top_k = min(params.top_k or 0, 2**22)  # more than any vocabulary, and exact in float32
    return [params.temperature, top_k, params.top_p, params.min_p or 0, 0, 0, 0, 0]


def _words(seed: int) -> tuple[int, int]:
    """The two halves of a seed as int32 values."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
