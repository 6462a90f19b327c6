"""What a decode step leaves for the next one: arrays of a batch, in which each generation has rows.

A batch that stays together passes its arrays on as they are. Where generations come or go, the rows
of those that stay are joined anew; that copies append segments, which are short, and no cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from mlx_gptoss.cache import Segment


@dataclass(frozen=True, kw_only=True)
class StepArrays:
    """Arrays of B rows, made by one step or joined from several.

    Attributes:
        token: (B,) int32, sampled, not yet fed.
        control: (B, 8) int32: position, base, slot, seed low, seed high.
        logprob: (B,) float32 of `token`, at temperature 1.
        sampling: (B, 8) float32: temperature, top-k, top-p, min-p.
        append: keys and values since each row's last merge, (B, Hkv, ROWS, 64) each, per layer.
    """

    token: mx.array
    control: mx.array
    logprob: mx.array
    sampling: mx.array
    append: list[Segment]

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate, and to keep until a later step has been waited for."""
        return [self.token, self.control, self.logprob, *(a for pair in self.append for a in pair)]

    def map(self, change: Callable[[mx.array], mx.array]) -> "StepArrays":
        """The same with every array changed."""
        return StepArrays(
            token=change(self.token),
            control=change(self.control),
            logprob=change(self.logprob),
            sampling=change(self.sampling),
            append=[(change(keys), change(values)) for keys, values in self.append],
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
    """The rows of several generations as one batch, in their order."""
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
    return StepArrays(
        token=join([part.token for part in parts]),
        control=join([part.control for part in parts]),
        logprob=join([part.logprob for part in parts]),
        sampling=join([part.sampling for part in parts]),
        append=[(join([k for k, _ in s]), join([v for _, v in s])) for s in segments],
    )
