"""MXFP4 in numpy: blocks of 32 four-bit floats (E2M1) under one power-of-two scale (E8M0).

Published expert weights are never decoded on their way into the converted checkpoint: MLX's packed
words are the very bytes of the blocks, in the same order. Decoding serves the checks; quantising
serves fine-tunes whose experts are bfloat16.

Byte b of a block holds element 2b in its low nibble and 2b + 1 in its high one; a nibble is a sign
and one of eight magnitudes; a scale byte s means 2**(s - 127), and 255 means "not a number".

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 6.3.
"""

import functools

import numpy as np

BLOCK = 32
NAN_SCALE = 255
MAX_EXPONENT = 125  # 6 * 2**125 is the largest product of code and scale that float32 holds
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode to float32, exactly.

    Args:
        blocks: (..., n, 16) uint8.
        scales: (..., n) uint8, none of them 255.

    Returns:
        (..., n * 32) float32; infinite only where the true value exceeds float32, which takes a
        scale of 252 or more.
    """
    signed = np.concatenate([E2M1, -E2M1])
    values = np.empty((*blocks.shape[:-1], BLOCK), np.float32)
    values[..., 0::2] = signed[blocks & 15]
    values[..., 1::2] = signed[blocks >> 4]
    with np.errstate(over="ignore"):
        values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], -1)


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round bfloat16 values to MXFP4, each to the nearest of its block, ties to the even code.

    The scale is the better, by squared error, of the two that implementations use: the exponent of
    the largest magnitude less two (it clips magnitudes above 6 to 6), and one more (it does not).
    Weights that are MXFP4 already come back unchanged in value.

    Args:
        weight: (..., n * 32) float32, finite, representable in bfloat16.

    Returns:
        Blocks (..., n, 16) uint8 and scales (..., n) uint8. No value is off by more than a quarter
        of the largest magnitude of its block (or by 2**-129, a quarter of the smallest step).
    """
    groups = weight.reshape(*weight.shape[:-1], -1, BLOCK)
    magnitude = np.abs(groups)
    peak = magnitude.max(-1)
    exponent = np.maximum(np.frexp(peak)[1] - 3, -127)  # frexp: peak = m * 2**e, m in [0.5, 1)
    exponent[peak == 0] = 0
    codes = _codes(magnitude, exponent)
    clipped = (peak > np.ldexp(np.float32(6), exponent)) & (exponent < MAX_EXPONENT)
    if clipped.any():
        some, fits = magnitude[clipped], exponent[clipped]
        wider = _codes(some, fits + 1)
        better = 4 * _error(some, wider, fits + 1) < _error(some, codes[clipped], fits)
        codes[clipped] = np.where(better[:, None], wider, codes[clipped])
        exponent[clipped] = fits + better
    codes |= np.signbit(groups).astype(np.uint8) << 3
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).astype(np.uint8)


def _codes(magnitude: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Nearest code of each magnitude (..., 32) under the scales 2**exponent (...)."""
    scaled = magnitude * np.ldexp(np.float32(1), -exponent)[..., None]
    return _nearest_code()[scaled.view(np.uint32) >> 16]


@functools.cache
def _nearest_code() -> np.ndarray:
    """Code of every non-negative bfloat16, by its bits: one lookup instead of seven comparisons."""
    values = (np.arange(1 << 15, dtype=np.uint32) << 16).view(np.float32)
    midpoints = (E2M1[1:] + E2M1[:-1]) / 2
    below = np.searchsorted(midpoints, values, side="left")  # a tie goes down
    above = np.searchsorted(midpoints, values, side="right")  # a tie goes up
    return np.where(below % 2 == 0, below, above).astype(np.uint8)


def _error(magnitude: np.ndarray, codes: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Squared error of each block (...), in units of the square of its own scale."""
    scaled = magnitude * np.ldexp(np.float32(1), -exponent)[..., None]
    return np.square(scaled - E2M1[codes]).sum(-1)
