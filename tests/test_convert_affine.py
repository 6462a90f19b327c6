"""Affine quantization: MLX reads it as we do, and it is closer to the weights than MLX's own."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_gptoss.convert import affine


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    """Gaussian rows, some with an offset, one constant, one all zero: (40, 192) float32."""
    values = tiny.bf16_to_f32(tiny.normal("w", 1, (40, 192), std=0.04))
    values[3] += 1.0
    values[4] = 0.0
    values[5] = -0.375
    return tiny.bf16_to_f32(tiny.bf16(values))


def mlx_arrays(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> list[mx.array]:
    wide = [mx.array(bits).view(mx.bfloat16) for bits in (scales, biases)]
    return [mx.array(packed), *wide]


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_decodes_what_we_decode(weight: np.ndarray, bits: int) -> None:
    stored = affine.quantize(weight, bits)
    got = affine.decode(*stored, bits=bits)
    packed, scales, biases = mlx_arrays(*stored)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dense = mx.dequantize(packed, scales, biases, group_size=64, bits=bits)
    assert np.abs(np.array(dense) - got).max() <= 1e-6
    product = mx.quantized_matmul(mx.eye(192), packed, scales, biases, group_size=64, bits=bits)
    assert np.abs(np.array(product).T - got).max() <= 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_off_by_more_than_half_a_step(weight: np.ndarray, bits: int) -> None:
    packed, scales, biases = affine.quantize(weight, bits)
    error = np.abs(affine.decode(packed, scales, biases, bits=bits) - weight)
    steps = affine.f32(scales)
    assert (error.reshape(40, 3, 64).max(-1) <= 0.5001 * steps).all()
    reach = np.ptp(weight.reshape(40, 3, 64), -1)
    assert (steps <= reach / (2**bits - 1) * 1.008).all()  # rounding up to bfloat16 costs < 1 %


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_closer_than_mlx_quantize(weight: np.ndarray, bits: int, dtype: mx.Dtype) -> None:
    """Both as a matmul sees them (float32) and as an embedding does (decoded in bfloat16)."""
    stored = mx.quantize(mx.array(weight).astype(mx.bfloat16), group_size=64, bits=bits)
    error = []
    for packed, *wide in (mlx_arrays(*affine.quantize(weight, bits)), stored):
        wide = [array.astype(dtype) for array in wide]
        dense = mx.dequantize(packed, *wide, group_size=64, bits=bits).astype(mx.float32)
        error.append(np.abs(np.array(dense) - weight))
    ours, theirs = error
    assert ours.max() < theirs.max()
    assert np.square(ours).mean() < np.square(theirs).mean()


def test_constant_groups_are_exact(weight: np.ndarray) -> None:
    got = affine.decode(*affine.quantize(weight, 8), bits=8)
    assert np.array_equal(got[4:6], weight[4:6])
