"""Sizes, weights and random numbers, of which `cases` makes the inputs of each kernel.

Weights are a model's own, or random and scaled so that outputs are of order one; all else is
random. K and V rows that no token may see hold NaN in the segments, so that a kernel which lets one
in is found out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_gptoss.kernels.projections import Segment
from mlx_gptoss.matrix import Matrix

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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that the kernels of one layer read, by name; those that are absent are random.

    Attributes:
        matrices: embedding, q, k, v, out, router, gate, up, down, unembedding.
        vectors: attention_norm, sinks, moe_norm, norm.
    """

    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    vectors: Mapping[str, mx.array] = field(default_factory=dict)


class Inputs:
    """A stream of inputs, the same for the same seed.

    Args:
        sizes: of the arrays.
        dtype: of activations, caches, and of plain weights and biases.
        dense: how random dense matrices are stored.
        weights: that are not random.
        seed: of the numbers.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        dtype: mx.Dtype,
        dense: Dense = "plain",
        weights: Weights | None = None,
        seed: int = 0,
    ):
        self.sizes, self.dtype, self.dense = sizes, dtype, dense
        self._weights = weights or Weights()
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Normal numbers in the case's type."""
        values = self._random.standard_normal(shape, dtype=np.float32) * scale
        return mx.array(values).astype(self.dtype)

    def vector(self, name: str, count: int) -> mx.array:
        """A norm, or the sinks."""
        own = self._weights.vectors.get(name)
        return self.normal(count) if own is None else own

    def matrix(self, name: str, rows: int, columns: int, *, bias: bool = True) -> Matrix:
        """A dense matrix; a random one is stored as the case says."""
        if name in self._weights.matrices:
            return self._weights.matrices[name]
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

    def expert_matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """MXFP4 experts; random ones have all codes and a spread of scales."""
        if name in self._weights.matrices:
            return self._weights.matrices[name]
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

    def expert_bias(self, name: str, rows: int) -> mx.array:
        """The biases of `expert_matrix` alone, (E, rows)."""
        own = self._weights.matrices.get(name)
        bias = own.bias if own else self.normal(self.sizes.experts, rows)
        assert bias is not None
        return bias

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

    def crowded_logits(self) -> mx.array:
        """Router logits of rows that all choose the last expert, and all but each third the first.

        So blocks of pairs are full, in part and with a single one, and most experts have none.
        """
        ids, rows = mx.arange(self.sizes.experts), mx.arange(self.sizes.batch)[:, None]
        crowded = (ids == self.sizes.experts - 1) | ((ids == 0) & (rows % 3 > 0))
        return self.logits() / 10 + mx.where(crowded, 1.0, 0.0)  # of like weights
