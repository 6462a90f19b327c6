"""YaRN as gpt-oss means it: range not rounded, exact at the end of the context, halves paired."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.config import GPT_OSS_20B, ModelConfig
from mlx_gptoss.rope import (
    RopeTable,
    concentration,
    correction_range,
    inverse_frequencies,
    rotate,
    softmax_scale,
)


def with_rope(**changes: float | bool) -> ModelConfig:
    rope = dataclasses.replace(GPT_OSS_20B.rope, **changes)
    return dataclasses.replace(GPT_OSS_20B, rope=rope)


def frequency(pair: int, low: float, high: float) -> float:
    """One frequency of the published model, written down a second time."""
    plain = 150000 ** -(pair / 32)
    if pair <= low:
        return plain
    if pair >= high:
        return plain / 32
    share = (pair - low) / (high - low)
    return plain * (1 - share) + plain / 32 * share


def test_the_correction_range_is_not_rounded() -> None:
    """mlx-lm and llama.cpp round it to (8, 18), whatever `truncate` says."""
    assert correction_range(GPT_OSS_20B) == pytest.approx((8.0928, 17.3980), abs=1e-4)
    assert correction_range(with_rope(truncate=True)) == (8, 18)


@pytest.mark.parametrize("truncate", [False, True])
def test_frequencies_by_hand(truncate: bool) -> None:
    low, high = (8, 18) if truncate else (8.092779115512402, 17.39802450158856)
    expected = [frequency(pair, low, high) for pair in range(32)]
    np.testing.assert_allclose(
        inverse_frequencies(with_rope(truncate=truncate)), expected, rtol=1e-12
    )


def test_what_rounding_would_cost() -> None:
    ratio = inverse_frequencies(with_rope(truncate=True)) / inverse_frequencies(GPT_OSS_20B)
    assert ratio.argmax() == 17
    assert ratio[17] == pytest.approx(1.763, abs=1e-3)


def test_concentration_is_in_the_softmax_scale() -> None:
    assert concentration(GPT_OSS_20B) == pytest.approx(1.3465735903)
    assert softmax_scale(GPT_OSS_20B) == pytest.approx(1.3465735903**2 / 8)
    assert concentration(with_rope(factor=1.0)) == 1


@pytest.mark.parametrize("position", [0, 1, 127, 128, 129, 4095, 4096, 60_000, 131_071])
def test_angles_are_exact_at_every_position(position: int) -> None:
    """Angles formed in float32 are wrong by 6e-3 at the end of the context."""
    cos, sin = RopeTable.of(GPT_OSS_20B).at(mx.array([[position]]))
    angles = position * inverse_frequencies(GPT_OSS_20B)
    assert cos.shape == (1, 1, 1, 32)
    np.testing.assert_allclose(np.array(cos)[0, 0, 0], np.cos(angles), atol=2e-7)
    np.testing.assert_allclose(np.array(sin)[0, 0, 0], np.sin(angles), atol=2e-7)


def test_rotation_pairs_the_halves() -> None:
    """Dimension d turns with d + 32, as complex numbers do; not with d + 1."""
    x = mx.random.normal((2, 3, 5, 64), key=mx.random.key(0))
    positions = mx.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    got = np.array(rotate(x, *RopeTable.of(GPT_OSS_20B).at(positions)))
    halves = np.array(x, np.float64)
    turned = (halves[..., :32] + 1j * halves[..., 32:]) * np.exp(
        1j * np.array(positions)[:, None, :, None] * inverse_frequencies(GPT_OSS_20B)
    )
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)


def test_scores_depend_on_distance_alone() -> None:
    table = RopeTable.of(GPT_OSS_20B)
    q, k = mx.random.normal((2, 1, 1, 1, 64), key=mx.random.key(1))

    def score(query: int, key: int) -> float:
        turned = (rotate(x, *table.at(mx.array([[p]]))) for x, p in ((q, query), (k, key)))
        return math.fsum(np.array(mx.multiply(*turned)).ravel())

    assert score(131_000, 130_900) == pytest.approx(score(100, 0), abs=1e-5)
