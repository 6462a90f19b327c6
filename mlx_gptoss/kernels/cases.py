"""Random inputs of given sizes for every kernel: for the first-use check, the tests, the counters.

Weights are scaled so that outputs are of order one; K and V rows that no token may see hold NaN in
the segments, so that a kernel which lets one in is found out.
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_gptoss.kernels import definitions
from mlx_gptoss.kernels.matrix import simdgroups
from mlx_gptoss.kernels.projections import Segment
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.reference import choose_experts
from mlx_gptoss.sampling import packed

Dense = Literal["plain", "q8", "q4"]
Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of one case.

    The defaults differ pairwise, cross the window, and give simdgroups more than one step.
    """

    batch: int = 2
    hidden: int = 192
    inter: int = 160
    q_heads: int = 15
    kv_heads: int = 5
    experts: int = 20
    chosen: int = 4
    vocab: int = 704
    window: int = 96
    capacity: int = 480
    rows: int = 48
    base: int = 461
    slot: int = 37
    splits: int = 3
    tokens: int = 67


class Inputs:
    """A stream of random inputs, the same for the same seed.

    Args:
        sizes: of the arrays.
        dtype: of activations, caches, and of plain weights and biases.
        dense: how the dense matrices are stored.
        seed: of the numbers.
    """

    def __init__(self, sizes: Sizes, *, dtype: mx.Dtype, dense: Dense = "plain", seed: int = 0):
        self.sizes, self.dtype, self.dense = sizes, dtype, dense
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Normal numbers in the case's type."""
        values = self._random.standard_normal(shape, dtype=np.float32) * scale
        return mx.array(values).astype(self.dtype)

    def matrix(self, rows: int, columns: int, *, bias: bool = True) -> Matrix:
        """A dense matrix, stored as the case says."""
        added = self.normal(rows) if bias else None
        plain = self.normal(rows, columns, scale=columns**-0.5)
        if self.dense == "plain":
            return Matrix(weight=plain, bias=added)
        bits = 8 if self.dense == "q8" else 4
        weight, scales, offsets = mx.quantize(plain, group_size=64, bits=bits)
        return Matrix(
            weight=weight,
            scales=scales,
            offsets=offsets,
            bias=added,
            group_size=64,
            bits=bits,
            mode="affine",
        )

    def expert_matrix(self, rows: int, columns: int) -> Matrix:
        """MXFP4 experts with all codes and a spread of scales."""
        shape = (self.sizes.experts, rows)
        codes = self._random.integers(0, 2**32, (*shape, columns // 8), dtype=np.uint32)
        middle = 127 - round(np.log2(columns) / 2) - 1
        scales = self._random.integers(middle - 2, middle + 2, (*shape, columns // 32))
        return Matrix(
            weight=mx.array(codes),
            scales=mx.array(scales.astype(np.uint8)),
            bias=self.normal(*shape),
            group_size=32,
            bits=4,
            mode="mxfp4",
        )

    def bases(self) -> list[int]:
        """Positions in the frozen segment of each row."""
        return [max(0, self.sizes.base - 7 * row) for row in range(self.sizes.batch)]

    def control(self) -> mx.array:
        """Position, base and slot; the rows of a batch differ in their base."""
        slot = self.sizes.slot
        rows = [[base + slot, base, slot, 5 + base, 9, 0, 0, 0] for base in self.bases()]
        return mx.array(rows, dtype=mx.int32)

    def segment(self, rows: int, used: list[int]) -> Segment:
        """Keys and values (B, Hkv, rows, 64), NaN from `used` on."""
        s, nan = self.sizes, mx.array(mx.nan, dtype=self.dtype)
        counts = (mx.array(used)[:, None] > mx.arange(rows))[:, None, :, None]
        shape = (s.batch, s.kv_heads, rows, 64)
        keys, values = (mx.where(counts, self.normal(*shape), nan) for _ in range(2))
        return keys, values

    def segments(self, rows: int) -> Arguments:
        """The two segments that an attention kernel reads."""
        s = self.sizes
        return {
            "control": self.control(),
            "frozen": self.segment(rows, [min(base, rows) for base in self.bases()]),
            "append": self.segment(s.rows, [s.slot + 1] * s.batch),
        }

    def logits(self) -> mx.array:
        """Router logits (B, E) float32."""
        return self.normal(self.sizes.batch, self.sizes.experts, scale=2).astype(mx.float32)


def embed(make: Inputs) -> Arguments:
    """Inputs of `kernels.embed`: the first and the last token among them."""
    s = make.sizes
    tokens = [(row * (s.vocab // 3) - row % 2) % s.vocab for row in range(s.batch)]
    return {
        "token": mx.array(tokens, dtype=mx.int32),
        "matrix": make.matrix(s.vocab, s.hidden, bias=False),
        "width": s.hidden,
        "dtype": make.dtype,
    }


def norm_qkv_rope(make: Inputs) -> Arguments:
    """Inputs of `kernels.norm_qkv_rope`; tables of random angles mean what real ones mean."""
    s, control = make.sizes, make.control()
    angles = [make.normal(count, 32).astype(mx.float32) for count in (s.capacity // 128 + 2, 128)]
    coarse, fine = (mx.stack([mx.cos(a), mx.sin(a)], axis=1) for a in angles)
    heads = (s.q_heads, s.kv_heads, s.kv_heads)
    return {
        "x": make.normal(s.batch, s.hidden, scale=3),
        "norm": make.normal(s.hidden),
        "projections": tuple(make.matrix(count * 64, s.hidden) for count in heads),
        "rope": (coarse, fine),
        "control": control,
        "append": make.segment(s.rows, [s.rows] * s.batch),
        "eps": 1e-5,
    }


def attention_decode(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_decode`."""
    s = make.sizes
    q = make.normal(s.batch, s.q_heads, 64)
    return {"q": q, **make.segments(s.capacity), "splits": s.splits, "scale": 0.17}


def attention_reduce(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_reduce`; the last split has seen nothing."""
    s = make.sizes
    sums = make.normal(s.batch, s.q_heads, s.splits, 64).astype(mx.float32)
    tops = make.normal(s.batch, s.q_heads, s.splits, scale=4).astype(mx.float32)
    totals = mx.abs(make.normal(s.batch, s.q_heads, s.splits).astype(mx.float32)) + 1
    empty = (mx.arange(s.splits) == s.splits - 1) & (s.splits > 1)
    ends = mx.stack([mx.where(empty, -mx.inf, tops), mx.where(empty, 0, totals)], axis=-1)
    sums = mx.where(empty[:, None], 0, sums)
    return {"sums": sums, "ends": ends, "sinks": make.normal(s.q_heads), "dtype": make.dtype}


def attention_window(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_window`."""
    s = make.sizes
    q = make.normal(s.batch, s.q_heads, 64)
    found = make.segments(s.window)
    return {
        "q": q,
        "ring": found["frozen"],
        "append": found["append"],
        "sinks": make.normal(s.q_heads),
        "control": found["control"],
        "scale": 0.17,
    }


def attention_window_prefill(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_window_prefill`: rows begin before, in and after the window.

    The rows before position 0 or in the padding hold NaN.
    """
    s, offset = make.sizes, make.sizes.base
    start = mx.array([max(0, offset - 120 + 50 * row) for row in range(s.batch)], mx.int32)
    rows = s.window + s.tokens
    exists = (mx.arange(rows) + (offset - s.window) >= start[:, None])[:, None, :, None]
    nan = mx.array(mx.nan, dtype=make.dtype)
    keys, values = (
        mx.where(exists, make.normal(s.batch, s.kv_heads, rows, 64), nan) for _ in range(2)
    )
    return {
        "q": make.normal(s.batch, s.q_heads, s.tokens, 64),
        "keys": keys,
        "values": values,
        "sinks": make.normal(s.q_heads),
        "scale": 0.17,
        "offset": offset,
        "start": start,
    }


def out_residual(make: Inputs) -> Arguments:
    """Inputs of `kernels.out_residual`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.q_heads * 64),
        "matrix": make.matrix(s.hidden, s.q_heads * 64),
        "residual": make.normal(s.batch, s.hidden),
    }


def route(make: Inputs) -> Arguments:
    """Inputs of `kernels.route`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.hidden, scale=3),
        "norm": make.normal(s.hidden),
        "router": make.matrix(s.experts, s.hidden),
        "eps": 1e-5,
    }


def experts_swiglu(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_swiglu`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.hidden),
        "logits": make.logits(),
        "gate": make.expert_matrix(s.inter, s.hidden),
        "up": make.expert_matrix(s.inter, s.hidden),
        "chosen": s.chosen,
        "alpha": 1.702,
        "limit": 7.0,
    }


def experts_down(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_down`."""
    s = make.sizes
    return {
        "h": make.normal(s.batch, s.chosen, s.inter),
        "logits": make.logits(),
        "down": make.expert_matrix(s.hidden, s.inter),
        "residual": make.normal(s.batch, s.hidden),
    }


def expert_groups(make: Inputs) -> Arguments:
    """Inputs of `kernels.expert_groups`."""
    return {"logits": make.logits(), "chosen": make.sizes.chosen}


def experts_swiglu_grouped(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_swiglu_grouped`: the rows' choices, in blocks."""
    given = experts_swiglu(make)
    blocks, _ = definitions.expert_groups(given.pop("logits"), chosen=make.sizes.chosen)
    return {"x": given.pop("x"), "blocks": blocks, **given}


def experts_down_grouped(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_down_grouped`."""
    given = experts_down(make)
    blocks, choice = definitions.expert_groups(given["logits"], chosen=make.sizes.chosen)
    return {"h": given["h"], "blocks": blocks, "choice": choice, "down": given["down"]}


def experts_sum(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_sum`."""
    s = make.sizes
    _, choice = definitions.expert_groups(make.logits(), chosen=s.chosen)
    parts = simdgroups(s.inter)
    return {
        "sums": make.normal(s.batch, s.chosen, parts, s.hidden).astype(mx.float32),
        "choice": choice,
        "bias": make.normal(s.experts, s.hidden),
        "residual": make.normal(s.batch, s.hidden),
    }


def expert_dispatch(make: Inputs) -> Arguments:
    """Inputs of `kernels.expert_dispatch`: `choose_experts` of random logits, none to expert 1."""
    s = make.sizes
    logits = make.normal(s.tokens, s.experts).astype(mx.float32)
    logits = mx.where(mx.arange(s.experts) == 1, -mx.inf, logits)
    experts, _ = choose_experts(logits, chosen=s.chosen)
    return {"experts": experts, "count": s.experts}


def unembed(make: Inputs) -> Arguments:
    """Inputs of `kernels.unembed`: row 0 greedy, the others drawn; one tile has no allowed id."""
    s = make.sizes
    temperature = mx.zeros((s.batch, 8)) + 0.7 * (mx.arange(s.batch) > 0)[:, None]
    return {
        "x": make.normal(s.batch, s.hidden, scale=3),
        "norm": make.normal(s.hidden),
        "matrix": make.matrix(s.vocab, s.hidden, bias=False),
        "allowed": mx.array(packed(_allowed(s) & (np.arange(s.vocab) // 64 != 1))),
        "control": make.control(),
        "temperature": temperature,
        "eps": 1e-5,
    }


def sample_token(make: Inputs) -> Arguments:
    """Inputs of `kernels.sample_token`: candidates of all tiles but one."""
    s = make.sizes
    logits = make.normal(s.batch, s.vocab, scale=3).astype(mx.float32)
    best = _candidates(mx.where(mx.arange(s.vocab) // 64 == 1, -mx.inf, logits))
    return {"best": best, "logits": logits, "control": make.control()}


def sample_filtered(make: Inputs) -> Arguments:
    """Inputs of `kernels.sample_filtered`: every filter, alone and together.

    Many logits are equal; at 1e4 degrees any token that is kept may be drawn.
    """
    s = make.sizes
    allowed = _allowed(s)
    logits = mx.round(make.normal(s.batch, s.vocab, scale=3).astype(mx.float32))
    filters = [(1e4, 5, 1, 0), (1e4, 0, 0.3, 0), (1e4, 0, 1, 0.3), (2, 70, 0.8, 0.001),
               (0, 3, 0.5, 0), (0.8, 0, 1, 0), (1e4, 40, 0.5, 0)]  # fmt: skip
    rows = [[*filters[row % 7], 0, 0, 0, 0] for row in range(s.batch)]
    return {
        "best": _candidates(mx.where(mx.array(allowed), logits, -mx.inf)),
        "logits": logits,
        "allowed": mx.array(packed(allowed)),
        "control": make.control(),
        "sampling": mx.array(rows, dtype=mx.float32),
    }


def _allowed(sizes: Sizes) -> np.ndarray:
    """(B, V) bool: all but each fifth id, in each row others."""
    return (np.arange(sizes.vocab) + np.arange(sizes.batch)[:, None]) % 5 > 0


def _candidates(logits: mx.array) -> mx.array:
    """What `unembed` says of each 64 logits, without noise; logits of -inf are not allowed."""
    vocabulary = logits.shape[-1]
    parts = logits.reshape(logits.shape[0], -1, 64)
    peak = parts.max(-1)
    ids = mx.argmax(parts, axis=-1) + 64 * mx.arange(parts.shape[1])
    ids = mx.where(peak == -mx.inf, vocabulary, ids).astype(mx.float32)
    total = mx.where(parts == -mx.inf, 0, mx.exp(parts - peak[..., None])).sum(-1)
    return mx.stack([peak, ids, peak, total], axis=-1)
