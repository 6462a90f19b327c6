"""Sampling: from logits to token ids, as pure functions of fixed shapes.

Order: allowed ids, top-k, top-p, min-p, temperature, draw. The filters see the probabilities before
the temperature, as in llama.cpp and mlx-lm; top-p renormalises what top-k left, as in llama.cpp.

The draw is a Gumbel arg-max whose noise is a hash of (seed, position, vocabulary index). There is
no generator state: a row gives the same tokens alone or in a batch, and a step that is thrown away
needs no rollback.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.matrix import on_cpu


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is sampled. The defaults are OpenAI's recommendation for gpt-oss.

    Attributes:
        temperature: Divisor of the logits, >= 0; 0 takes the most probable token.
        top_p: Smallest set of most probable tokens with at least this mass, in (0, 1]; 1 is off.
        top_k: Number of most probable tokens kept, >= 1; None is off.
        min_p: Least probability as a share of the most probable token's, in [0, 1); None is off.
        seed: Of the noise, in [0, 2**64); None draws one when the generation starts.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected a whole number >= 1 or None, got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: expected a number in [0, 1) or None, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected a whole number in [0, 2**64), got {self.seed}")

    def seeded(self) -> "SamplingParams":
        """These parameters with a seed: the given one, or a fresh one short enough to retype."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """The parameters of a batch as device arrays, made once per generation.

    Attributes:
        temperature: (B, 1) float32; 0 marks a greedy row.
        top_p: (B, 1) float32.
        top_k: (B, 1) int32; the largest int32 where it is off.
        min_p: (B, 1) float32; 0 where it is off.
        key: (B, 2) uint32, the hashed seed.
        draws: Some row has a temperature.
        sorts: Some drawing row has a top-k or top-p, which need the logits in order.
        ranks: Of that order, how many some row may keep: the largest top-k.
    """

    temperature: mx.array
    top_p: mx.array
    top_k: mx.array
    min_p: mx.array
    key: mx.array
    draws: bool
    sorts: bool
    ranks: int = 2**31 - 1

    @classmethod
    def pack(cls, params: Sequence[SamplingParams]) -> "SamplingRows":
        """Arrays for a batch of B sequences; a missing seed is an error of the caller."""
        seeds = [p.seed for p in params if p.seed is not None]
        if len(seeds) != len(params):
            raise ValueError("seed: every row needs one; call SamplingParams.seeded() first")
        off = 2**31 - 1
        drawing = [p for p in params if p.temperature > 0]
        return cls(
            temperature=mx.array([[p.temperature] for p in params], dtype=mx.float32),
            top_p=mx.array([[p.top_p] for p in params], dtype=mx.float32),
            top_k=mx.array([[min(p.top_k or off, off)] for p in params], dtype=mx.int32),
            min_p=mx.array([[p.min_p or 0.0] for p in params], dtype=mx.float32),
            key=mx.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=mx.uint32),
            draws=bool(drawing),
            sorts=any(p.top_p < 1 or p.top_k is not None for p in drawing),
            ranks=max((min(p.top_k or off, off) for p in drawing), default=off),
        )


def packed(flags: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """A flag for each id as bits, of id v bit v % 32 of word v // 32.

    Args:
        flags: (..., V), true for ids that may be chosen.

    Returns:
        (..., V/32 rounded up) uint32; bits beyond V are 0.
    """
    flags = np.asarray(flags) > 0
    rest = [(0, 0)] * (flags.ndim - 1) + [(0, -flags.shape[-1] % 32)]
    return np.packbits(np.pad(flags, rest), axis=-1, bitorder="little").view("<u4")


def unpacked(bits: mx.array, size: int) -> mx.array:
    """The first `size` flags of `packed`: (..., words) uint32 to (..., size) bool."""
    flags = (bits[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return flags.astype(mx.bool_).reshape(*bits.shape[:-1], -1)[..., :size]


def sample(
    logits: mx.array, positions: mx.array, *, rows: SamplingRows, allowed: mx.array
) -> mx.array:
    """Choose one token per row.

    Args:
        logits: (B, V), any float dtype.
        positions: (B,) integer: the place in its sequence of the token being chosen.
        rows: Parameters of the B rows.
        allowed: (V,) or (B, V) bool: ids that may be chosen; at least one per row.

    Returns:
        (B,) int32 token ids.
    """
    logits = mx.where(allowed, logits, -mx.inf)
    greedy = mx.argmax(logits, axis=-1)  # (B,)
    if not rows.draws:
        return greedy.astype(mx.int32)
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(-1, keepdims=True)  # the best token at 0: nothing overflows
    if rows.sorts:
        drawn = _draw_sorted(logits, positions, rows)
    else:
        drawn = mx.argmax(_scores(logits, _min_p(logits, rows), None, positions, rows), axis=-1)
    return mx.where(rows.temperature[:, 0] > 0, drawn, greedy).astype(mx.int32)


def _draw_sorted(logits: mx.array, positions: mx.array, rows: SamplingRows) -> mx.array:
    """Draw where top-k or top-p need ranks. Equal logits rank by id, so top-k keeps exactly k."""
    order = _best(logits, rows.ranks)  # (B, N)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    ranks = mx.arange(ranked.shape[-1], dtype=mx.int32)
    kept = ranks < rows.top_k  # (B, N)
    p = mx.softmax(mx.where(kept, ranked, -mx.inf), axis=-1)
    # A token stays while the mass before it is short of top_p, so the first always does. top_p = 1
    # keeps every rank: rounding of the running sum must not cut the tail off.
    before = mx.cumsum(p, axis=-1) - p
    kept &= (before < rows.top_p) | (rows.top_p >= 1)
    kept &= _min_p(ranked, rows)
    best = mx.argmax(_scores(ranked, kept, order, positions, rows), axis=-1, keepdims=True)
    return mx.take_along_axis(order, best, axis=-1)[:, 0]


def _best(logits: mx.array, count: int) -> mx.array:
    """Ids of the `count` best of logits (B, V) that are <= 0, and of a few more, in order."""
    vocabulary = logits.shape[-1]
    count = min(-(-count // 64) * 64, vocabulary)  # whole vectors, so that sums keep their order
    if not on_cpu():
        return mx.argsort(-logits, axis=-1)[:, :count]  # a stable sort
    # A partition takes any of equal logits, so ids are part of the keys. Floats >= 0 have the order
    # of their bits.
    keys = (0.0 - logits).view(mx.uint32).astype(mx.uint64) << 32
    keys = keys | mx.arange(vocabulary, dtype=mx.uint64)
    if count < vocabulary:
        keys = mx.partition(keys, count, axis=-1)[:, :count]
    return (mx.sort(keys, axis=-1) & 0xFFFFFFFF).astype(mx.uint32)


def _min_p(logits: mx.array, rows: SamplingRows) -> mx.array:
    """(B, V) bool: tokens at least min_p times as probable as the best, whose logit is 0."""
    return logits >= mx.log(rows.min_p)  # log 0 = -inf keeps everything


def _scores(
    logits: mx.array,
    kept: mx.array,
    ids: mx.array | None,
    positions: mx.array,
    rows: SamplingRows,
) -> mx.array:
    """(B, V) float32 whose arg-max is a draw from softmax(logits / temperature) over `kept`.

    Source: Gumbel (1954); arg-max of z + G samples softmax(z) when G = -log(E), E exponential.
    """
    if ids is None:
        ids = mx.arange(logits.shape[-1], dtype=mx.uint32)[None]
    # Below 1e-6 only the best logit has any mass left; the bound keeps 0 / 0 out of tied rows.
    scaled = logits / mx.maximum(rows.temperature, 1e-6)
    return mx.where(kept, scaled + gumbel(rows.key, positions, ids=ids), -mx.inf)


def gumbel(key: mx.array, positions: mx.array, *, ids: mx.array) -> mx.array:
    """Standard Gumbel noise as a function of (key, position, id) alone.

    Args:
        key: (B, 2) uint32, low and high word of the seed.
        positions: (B,) integer.
        ids: (1, N) or (B, N) uint32.

    Returns:
        (B, N) float32, finite.
    """
    low = _mix(key[:, :1] + 0x9E3779B9)  # an odd constant: seed 0 must not hash to 0
    a = _mix(low ^ positions[:, None].astype(mx.uint32))  # (B, 1)
    b = _mix(_mix(key[:, 1:] ^ low) + a)
    bits = _mix(_mix(ids.astype(mx.uint32) + a) ^ b)  # (B, N)
    # E = -log(1 - w) has its resolution near w = 0, where the arg-max is decided; w stays < 1.
    w = mx.minimum((bits.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -mx.log(-mx.log1p(-w))


def _mix(x: mx.array) -> mx.array:
    """A bijection of uint32 in which every input bit flips each output bit about half the time.

    Source: "lowbias32" of Chris Wellons' hash-prospector, public domain.
    """
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
