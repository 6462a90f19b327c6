"""What a chip allows and what we predict, held to arithmetic and to published speeds."""

import pytest

from mlx_gptoss.chips import CHIPS, find_chip
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
from mlx_gptoss.plan import dense_quantization
from mlx_gptoss.roofline import (
    limit_tok_per_s,
    predicted_prefill_tok_per_s,
    predicted_tok_per_s,
    prefill_flops,
    prefill_limit_tok_per_s,
    step_bytes,
)


def test_bytes_of_a_token_by_hand():
    """20b in bf16 reads 3.71 GB a token: 4 of 32 experts, and everything else but the embedding."""
    packing = dense_quantization(GPT_OSS_20B, "bf16")
    weights, kv = step_bytes(GPT_OSS_20B, packing, depth=1024)
    assert weights == pytest.approx(3.708e9, rel=1e-3)
    assert kv == 12 * 2048 * 1024 + 12 * 2048 * 128
    q8 = dense_quantization(GPT_OSS_120B, "q8")
    assert step_bytes(GPT_OSS_120B, q8, depth=1)[0] == pytest.approx(3.565e9, rel=1e-3)
    two, kv_of_two = step_bytes(GPT_OSS_20B, packing, depth=1024, batch=2)
    experts = 24 * 32 * 3 * 2880 * (1440 + 90 + 2)
    assert two - weights == pytest.approx((1 / 8) * (7 / 8) * experts + 2880 * 2, rel=1e-6)
    assert kv_of_two == 2 * kv


def test_prefill_is_bound_by_arithmetic():
    """6.06 GFLOP a token of the 20b, 9.10 of the 120b; attention is a third of 32k tokens' work."""
    products, scores = prefill_flops(GPT_OSS_20B, prompt=32768)
    assert products / 32768 == pytest.approx(6.06e9, rel=2e-3)
    assert prefill_flops(GPT_OSS_120B, prompt=7)[0] / 7 == pytest.approx(9.10e9, rel=2e-3)
    assert scores / products == pytest.approx(0.53, rel=0.02)
    for chip in CHIPS:
        for prompt in (512, 32768):
            guess = predicted_prefill_tok_per_s(GPT_OSS_20B, chip, prompt=prompt)
            assert 0.2 < guess / prefill_limit_tok_per_s(GPT_OSS_20B, chip, prompt=prompt) < 0.56
    measured = predicted_prefill_tok_per_s(GPT_OSS_20B, find_chip("M1 Max"), prompt=512)
    assert measured == pytest.approx(1022, rel=0.1)  # llama.cpp's, one of those fitted to


def test_predictions_stay_below_limits_and_grow_with_the_chip():
    packing = dense_quantization(GPT_OSS_20B, "bf16")
    for chip in CHIPS:
        speeds = [predicted_tok_per_s(GPT_OSS_20B, packing, chip, depth=d) for d in (64, 8192)]
        limits = [limit_tok_per_s(GPT_OSS_20B, packing, chip, depth=d) for d in (64, 8192)]
        assert speeds[1] < speeds[0] < limits[0] and speeds[1] < limits[1]
        assert speeds[0] > 0.4 * limits[0]
    small, large = (
        predicted_tok_per_s(GPT_OSS_20B, packing, find_chip(name), depth=1024)
        for name in ("M4", "M4 Max")
    )
    assert 3 < large / small < 546 / 120
