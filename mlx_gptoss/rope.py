"""Rotary position embedding with YaRN, exact at every position of the context.

Two things here are where implementations go wrong. gpt-oss does not round YaRN's correction range
to whole dimensions (`truncate: false`); rounding it turns some frequencies by up to 76 %. And
float32 angles are off by 6 mrad at position 131,000; so sines and cosines are computed in float64
and kept as two small tables, of every 128th position and of the 128 between, which are joined by
the angle-sum formulas.

YaRN's concentration is not applied here: it scales queries and keys alike, so its square belongs
to the softmax scale (`softmax_scale`), where it costs nothing and no rounding.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gptoss.config import ModelConfig

FINE = 128  # positions in the fine table


def correction_range(config: ModelConfig) -> tuple[float, float]:
    """The rotary pairs between which YaRN blends stretched into unstretched frequencies.

    Returns:
        (low, high): at and below `low` a frequency is kept, at and above `high` it is divided by
        the factor. Rounded outwards only if the config says `truncate`.

    Source: Peng et al. 2023, "YaRN", section 3.2; openai/gpt-oss `RotaryEmbedding` (not rounded);
        transformers `_compute_yarn_parameters` (the same with `truncate: false`).
    """
    rope = config.rope

    def pair_that_turns(rotations: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return low, high if high > low else low + 0.001


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotary pair, (Dh/2,) float64."""
    low, high = correction_range(config)
    pair = np.arange(config.head_dim // 2, dtype=np.float64)
    plain = config.rope_theta ** (-2 * pair / config.head_dim)
    stretched = np.clip((pair - low) / (high - low), 0, 1)
    return plain / config.rope.factor * stretched + plain * (1 - stretched)


def concentration(config: ModelConfig) -> float:
    """YaRN's factor on queries and on keys: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(config.rope.factor) + 1 if config.rope.factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What multiplies q . k: 1/sqrt(Dh), and the concentration of both sides."""
    return concentration(config) ** 2 / math.sqrt(config.head_dim)


@dataclass(frozen=True)
class RopeTable:
    """Cosine and sine of position * frequency: `coarse` at multiples of 128, `fine` at 0..127.

    Both are (rows, 2, Dh/2) float32, rounded once from float64.
    """

    coarse: mx.array
    fine: mx.array

    @classmethod
    def of(cls, config: ModelConfig) -> "RopeTable":
        """The table for every position below `max_position_embeddings`."""
        frequencies = inverse_frequencies(config)

        def rows(positions: np.ndarray) -> mx.array:
            angles = positions[:, None] * frequencies
            return mx.array(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))

        return cls(rows(np.arange(0, config.max_position_embeddings, FINE)), rows(np.arange(FINE)))

    def at(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Cosines and sines of some positions.

        Args:
            positions: (B, T) int32, each in [0, max_position_embeddings), unchecked.

        Returns:
            cos, sin: (B, 1, T, Dh/2) float32, shaped to broadcast over heads.
        """
        coarse = self.coarse[positions // FINE][:, None]  # (B, 1, T, 2, Dh/2)
        fine = self.fine[positions % FINE][:, None]
        a_cos, a_sin, b_cos, b_sin = (t[..., i, :] for t in (coarse, fine) for i in (0, 1))
        return a_cos * b_cos - a_sin * b_sin, a_sin * b_cos + a_cos * b_sin


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each pair (d, d + Dh/2) of every head by its angle, in float32.

    Args:
        x: (B, heads, T, Dh), any float type.
        cos: (B, 1, T, Dh/2) float32, as `sin`, from `RopeTable.at`.
        sin: see `cos`.

    Returns:
        (B, heads, T, Dh) float32.
    """
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
