"""MXFP4: decoded exactly, by us and by MLX, for every byte under every scale; rounded well."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_gptoss.convert import mxfp4

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
SCALES = 255  # scale bytes 0..254; 255 is refused, see test_convert_errors.py


@pytest.fixture(scope="module")
def every_byte() -> tuple[np.ndarray, np.ndarray]:
    """One row for each scale byte, whose 16 blocks hold all 256 byte values."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(SCALES, axis=0)
    scales = np.arange(SCALES, dtype=np.uint8)[:, None].repeat(16, axis=1)
    return blocks, scales


@pytest.fixture(scope="module")
def truth(every_byte: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """float64 by the definition: sign, exponent and mantissa of each nibble, low nibble first."""
    blocks, scales = every_byte
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(SCALES, 16, 32).astype(int)
    sign, exponent, mantissa = nibbles >> 3, nibbles >> 1 & 3, nibbles & 1
    normal = (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    value = np.where(exponent == 0, mantissa / 2, normal) * np.where(sign, -1.0, 1.0)
    return (value * 2.0 ** (scales[..., None].astype(float) - 127)).reshape(SCALES, 512)


def bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).view(np.uint32)


def test_our_decode_is_exact(every_byte: tuple[np.ndarray, np.ndarray], truth: np.ndarray) -> None:
    assert np.array_equal(bits(mxfp4.decode(*every_byte)), bits(truth))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("route", ["dequantize", "quantized_matmul", "gather_qmm"])
def test_mlx_decodes_the_same_bytes_exactly(
    every_byte: tuple[np.ndarray, np.ndarray], truth: np.ndarray, route: str, dtype: mx.Dtype
) -> None:
    """The packed words are the blocks' bytes, reinterpreted; a one-hot row picks each column."""
    blocks, scale_bytes = every_byte
    packed = mx.array(blocks.reshape(SCALES, -1).view(np.uint32))
    scales = mx.array(scale_bytes)
    one_hot = mx.eye(512).astype(dtype)
    if route == "dequantize":
        got = mx.dequantize(packed, scales, dtype=dtype, **MXFP4)
    elif route == "quantized_matmul":
        got = mx.quantized_matmul(one_hot, packed, scales, transpose=True, **MXFP4).T
    else:
        picked = mx.zeros((512,), mx.uint32)
        rows = mx.gather_qmm(
            one_hot[:, None],
            packed[None],
            scales[None],
            rhs_indices=picked,
            transpose=True,
            **MXFP4,
        )
        got = rows[:, 0].T
    with np.errstate(over="ignore"):
        wanted = mx.array(truth.astype(np.float32)).astype(dtype).astype(mx.float32)
    same = np.array(got.astype(mx.float32)).view(np.uint32) == np.array(wanted).view(np.uint32)
    zero = (np.array(got.astype(mx.float32)) == 0) & (truth == 0)  # a matmul has no negative zero
    assert (same | zero if route != "dequantize" else same).all()


def test_values_that_are_mxfp4_come_back_unchanged(
    every_byte: tuple[np.ndarray, np.ndarray], truth: np.ndarray
) -> None:
    rows = slice(0, 252)  # above, 6 * 2**(s - 127) no longer fits float32
    values = truth[rows].astype(np.float32)
    blocks, scales = mxfp4.quantize(values)
    assert np.array_equal(mxfp4.decode(blocks, scales), values)


def reference_quantize(values: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Values rounded to the grid of a given exponent, by comparing with all 15 of its values."""
    grid = np.concatenate([-mxfp4.E2M1[:0:-1], mxfp4.E2M1]).astype(np.float64)
    scaled = values.reshape(*exponent.shape, 32) / 2.0 ** exponent[..., None].astype(np.float64)
    nearest = np.abs(scaled[..., None] - grid).argmin(-1)
    return (grid[nearest] * 2.0 ** exponent[..., None].astype(np.float64)).reshape(values.shape)


@pytest.mark.parametrize("std", [1e-3, 1.0, 300.0])
def test_rounding_is_as_good_as_the_better_of_two_scales(std: float) -> None:
    values = tiny.bf16_to_f32(tiny.normal("w", 3, (48, 320), std=std))
    groups = values.reshape(48, 10, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(-1))).astype(int) - 2
    errors = [
        np.square(reference_quantize(values, exponent + more) - values).reshape(48, 10, 32).sum(-1)
        for more in (0, 1)
    ]
    got = mxfp4.decode(*mxfp4.quantize(values))
    ours = np.square(got.astype(np.float64) - values).reshape(48, 10, 32).sum(-1)
    assert np.allclose(ours, np.minimum(*errors), rtol=1e-6, atol=0)
    assert (errors[1] < errors[0]).any()
    stored = mx.quantize(mx.array(values), **MXFP4)
    theirs = np.array(mx.dequantize(stored[0], stored[1], dtype=mx.float32, **MXFP4))
    assert ours.sum() < np.square(theirs.astype(np.float64) - values).sum()


def test_no_value_is_off_by_more_than_a_quarter_of_its_block() -> None:
    values = tiny.bf16_to_f32(tiny.normal("w", 4, (64, 1024), std=0.05))
    error = np.abs(mxfp4.decode(*mxfp4.quantize(values)) - values).reshape(64, 32, 32).max(-1)
    assert (error <= np.abs(values).reshape(64, 32, 32).max(-1) / 4).all()


def test_extreme_blocks() -> None:
    largest, smallest = np.float32(3.3895314e38), np.float32(2.0**-133)  # of bfloat16
    values = np.zeros((4, 32), np.float32)
    values[0, 3], values[1, 5], values[2, 7], values[2, 8] = largest, smallest, -1.5, 2**-20
    blocks, scales = mxfp4.quantize(values)
    got = mxfp4.decode(blocks, scales)
    assert scales.max() <= 254
    assert abs(float(got[0, 3]) / largest - 1) <= 0.25
    assert abs(got[1, 5] - smallest) <= 2.0**-129
    assert got[2, 7] == -1.5 and got[2, 8] == 0
    assert not got[3].any()


def test_ties_go_to_the_even_code() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :9] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5]
    got = mxfp4.decode(*mxfp4.quantize(values))[0, :9]
    assert got.tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -4]
