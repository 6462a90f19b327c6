"""Products with one matrix: packed against its values, and in halves against in one piece."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import matrix
from mlx_gptoss.matrix import Matrix, embed, linear

ROWS, COLUMNS = 1023, 1031  # odd, and just above the size from which products are halved
RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_weights(bits: int) -> None:
    weight = normal(48, 128)
    packed, scales, offsets = mx.quantize(weight, group_size=64, bits=bits)
    packed_matrix = Matrix(
        weight=packed, scales=scales, offsets=offsets, group_size=64, bits=bits, mode="affine"
    )
    values = np.array(mx.dequantize(packed, scales, offsets, group_size=64, bits=bits))
    x = normal(3, 128)
    assert np.abs(np.array(linear(x, packed_matrix)) - np.array(x) @ values.T).max() <= 1e-4
    rows = mx.array([[47, 0, 5]])
    assert np.array_equal(embed(rows, packed_matrix, mx.float32)[0], values[[47, 0, 5]])


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[mx.ThreadLocalStream]:
    """The second streams that were asked for."""
    asked, make = [], matrix._second_stream
    monkeypatch.setattr(matrix, "_second_stream", lambda: asked.append(make()) or asked[-1])
    return asked


def large(dtype: mx.Dtype, *, biased: bool) -> Matrix:
    bias = normal(ROWS).astype(dtype) if biased else None
    return Matrix(weight=normal(ROWS, COLUMNS).astype(dtype), bias=bias)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
def test_halves_are_the_whole_bit_for_bit(
    rows: int,
    biased: bool,
    dtype: mx.Dtype,
    streams: list[mx.ThreadLocalStream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1,023 rows: the halves differ in length. From 8 rows on a float32 product is flipped."""
    if not matrix.on_cpu():
        pytest.skip("products are halved on the CPU alone")
    x, weights = normal(2, rows, COLUMNS).astype(dtype), large(dtype, biased=biased)
    halves = linear(x, weights)
    assert len(streams) == 1
    monkeypatch.setattr(matrix, "HALVE_FROM", ROWS * COLUMNS + 1)
    assert mx.array_equal(halves, linear(x, weights))
    assert len(streams) == 1


def test_every_thread_multiplies_in_halves() -> None:
    """MLX's streams belong to threads; each thread here evaluates what it built."""
    weights, x = large(mx.float32, biased=True), normal(1, 1, COLUMNS)
    expected = np.array(linear(x, weights))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: np.array(linear(x, weights)), range(8)))
    assert all(np.array_equal(each, expected) for each in found)


def test_no_second_stream_off_the_cpu(
    streams: list[mx.ThreadLocalStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "on_cpu", lambda: False)
    mx.eval(linear(normal(1, 1, COLUMNS), large(mx.float32, biased=True)))
    assert not streams
