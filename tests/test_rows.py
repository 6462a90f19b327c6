"""Texts decoded together have the bits that each has alone, wherever each of them is."""

import itertools
import re

import mlx.core as mx
import numpy as np
import pytest
from tiny import TinyShape, hf_tensors
from weights import mlx_weights, tiny_config

from mlx_gptoss.checkpoint import converted_quantization
from mlx_gptoss.errors import CacheError
from mlx_gptoss.matrix import Matrix, expert_linear, linear
from mlx_gptoss.model import Model

SHAPE = TinyShape(
    layers=2, hidden=128, inter=64, q_heads=4, kv_heads=2, experts=6, chosen=3, vocab=320
)
LENGTHS = [3, 127, 200, 126, 255]  # a window that opens, one that wraps, a merge at the 128th step


def model_of(dense: str, dtype: str) -> Model:
    config = tiny_config(SHAPE)
    packing = converted_quantization(config, dense)
    weights = mlx_weights(hf_tensors(SHAPE, 0))
    for module, packed in packing.items():
        if packed.mode == "affine":
            weight = weights[f"{module}.weight"]
            parts = mx.quantize(weight, group_size=packed.group_size, bits=packed.bits)
            weights |= zip((f"{module}.{p}" for p in ("weight", "scales", "biases")), parts)  # noqa: B905
    return Model(config, weights, quantization=packing, dtype=dtype)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab, length).tolist()


def started(model: Model, row: int):
    cache = model.make_cache()
    model.hidden(mx.array([text(row, LENGTHS[row])]), cache)
    mx.eval(cache.arrays)
    return cache


FORMS = [("bf16", "bfloat16"), ("bf16", "float32"), ("q8", "bfloat16"), ("q4", "bfloat16")]


@pytest.mark.parametrize(("dense", "dtype"), FORMS)
def test_rows_have_the_bits_they_have_alone(dense: str, dtype: str) -> None:
    """Five texts at other places in their windows; one joins late, one leaves early."""
    model, steps = model_of(dense, dtype), 5
    fed = [text(10 + row, steps) for row in range(5)]
    alone, caches = [], []
    for row in range(5):
        cache = started(model, row)
        alone.append([model.next_logits(mx.array([[token]]), cache) for token in fed[row]])
        mx.eval(alone[-1])
        caches.append(started(model, row))
    at = [0] * 5
    for step in range(steps + 1):
        present = [row for row in range(5) if (row != 1 or step) and (row != 3 or step < 3)]
        present = [row for row in present if at[row] < steps]
        logits = model.step_rows(
            mx.array([fed[row][at[row]] for row in present]), [caches[row] for row in present]
        )
        for place, row in enumerate(present):
            same = mx.array_equal(logits[place], alone[row][at[row]][0])
            assert same, f"{dense} {dtype}: row {row}, its token {at[row]}"
            at[row] += 1
    assert at == [steps, steps, steps, 3, steps]
    assert [cache.offset for cache in caches] == [
        length + count for length, count in zip(LENGTHS, at, strict=True)
    ]


def test_a_row_merges_while_others_do_not() -> None:
    model = model_of("bf16", "bfloat16")
    first, second = started(model, 0), started(model, 2)
    for _ in range(100):
        model.step_rows(mx.array([5]), [first])
        mx.eval(first.arrays)
    snapshot = first.snapshot()
    alone = []
    for _ in range(40):
        alone.append(model.step_rows(mx.array([7]), [first]))
        mx.eval(alone[-1], first.arrays)
    first.restore(snapshot)
    for step in range(40):
        together = model.step_rows(mx.array([7, step]), [first, second])
        mx.eval(together, first.arrays, second.arrays)
        assert mx.array_equal(together[0], alone[step][0]), step


def test_rows_without_a_cache_each_are_refused() -> None:
    model = model_of("bf16", "bfloat16")
    one, two = model.make_cache(), model.make_cache(2)
    with pytest.raises(ValueError, match=re.escape("one for each of 1 caches, got (2,)")):
        model.step_rows(mx.array([1, 2]), [one])
    with pytest.raises(CacheError, match="cache of 2 rows and 2 layers, but 1 rows were given"):
        model.step_rows(mx.array([1, 2]), [one, two])
    assert one.offset == 0


PACKINGS = {
    "float32": lambda w: Matrix(weight=w),
    "bfloat16": lambda w: Matrix(weight=w.astype(mx.bfloat16)),
    "q8": lambda w: affine(w, 8),
    "q4": lambda w: affine(w, 4),
}


def affine(weight: mx.array, bits: int) -> Matrix:
    packed, scales, offsets = mx.quantize(weight, group_size=64, bits=bits)
    return Matrix(
        weight=packed, scales=scales, offsets=offsets, group_size=64, bits=bits, mode="affine"
    )


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_of_published_width_is_the_same_for_any_number_of_rows(
    kind: str, biased: bool
) -> None:
    """1 to 16 rows of 2880 columns: no row may depend on how many share the call."""
    mx.random.seed(0)
    matrix = PACKINGS[kind](mx.random.normal((96, 2880)))
    if biased:
        bias = mx.random.normal((96,)).astype(mx.bfloat16 if kind == "bfloat16" else mx.float32)
        matrix = Matrix(**{**vars(matrix), "bias": bias})
    x = mx.random.normal((16, 2880)).astype(mx.bfloat16 if kind == "bfloat16" else mx.float32)
    alone = mx.concatenate([linear(x[row : row + 1], matrix) for row in range(16)])
    for rows in (2, 3, 5, 7, 8, 12, 16):
        assert mx.array_equal(linear(x[:rows], matrix), alone[:rows]), rows


def test_experts_are_the_same_for_any_number_of_rows() -> None:
    mx.random.seed(1)
    weight = mx.random.normal((5, 64, 2880)).astype(mx.bfloat16)
    packed, scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
    matrix = Matrix(weight=packed, scales=scales, bias=mx.random.normal((5, 64)), group_size=32,
                    bits=4, mode="mxfp4")  # fmt: skip
    x, experts = (
        mx.random.normal((8, 1, 1, 2880)),
        mx.random.randint(0, 5, (8, 4)).astype(mx.uint32),
    )

    def product(first: int, end: int) -> mx.array:
        return expert_linear(x[first:end], matrix, experts[first:end], grouped=False)

    alone = mx.concatenate([product(row, row + 1) for row in range(8)])
    for first, end in itertools.combinations(range(9), 2):
        assert mx.array_equal(product(first, end), alone[first:end]), (first, end)
