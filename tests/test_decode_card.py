"""Dispatches and bytes of a token, counted in the graph that MLX traces for the real sizes."""

import mlx.core as mx
import pytest

from benchmarks.batch_card import DEPTHS
from benchmarks.batch_steps import batch_weight_bytes, count_as_metal, experts_read, passes
from benchmarks.decode_card import (
    MODELS,
    count_batches,
    count_chunks,
    count_ours,
    kv_bytes,
    token_bytes,
)
from benchmarks.graph import mlx_lm_counts
from mlx_gptoss.config import FULL
from mlx_gptoss.dispatches import count_traced
from mlx_gptoss.kernels.inputs import Inputs, Sizes
from mlx_gptoss.kernels.products import PRODUCTS
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import all_kernels


@pytest.mark.parametrize(("model", "dense", "kernels"), [("20b", "q8", 159), ("120b", "bf16", 237)])
def test_dispatches_of_a_token(model: str, dense: str, kernels: int) -> None:
    """6 in a sliding layer, 7 in a full one, 3 besides, and nothing MLX adds: no copy, no view."""
    counted = count_ours(MODELS[model], dense)
    full = sum(kind == FULL for kind in MODELS[model].layer_types)
    assert kernels == 6 * MODELS[model].num_hidden_layers + full + 3
    assert (counted.kernels, counted.depth) == (kernels, kernels)


def test_steps_of_several_turns() -> None:
    """An attention for each row, then its output copied beside the others'; 4 for the experts."""
    steps = count_batches(MODELS["20b"], "q8")
    assert list(steps) == [1, 2, 4, 8, 16, 32]
    counts = {rows: (s["kernels_per_step"], s["dependent_dispatches"]) for rows, s in steps.items()}
    assert counts[1] == (159, 159)
    for rows in (2, 4, 8, 16):
        assert counts[rows] == (24 * (7 + 2 * rows) + 12 * rows + 3, 24 * 9 + 12 + 3)
    kernels, chain = counts[32]  # of MLX's products
    assert kernels < 24 * (32 + 2 * 32) + 12 * 32
    assert chain < 20 * 24
    bytes_of = [step["bytes_per_token"][1024] for step in steps.values()]
    assert bytes_of == sorted(bytes_of, reverse=True)


@pytest.mark.parametrize("stem", PRODUCTS)
def test_chains_of_products_are_those_of_the_card(stem: str) -> None:
    """The angles come before q and k, once for all layers: one more where there is no other."""
    kernels, given = all_kernels(), KERNELS[stem].case(Inputs(Sizes(), dtype=mx.bfloat16))
    matrices = [v for v in (*given.values(), *given.get("projections", ())) if hasattr(v, "bias")]
    mx.eval([vars(matrix) for matrix in matrices], list(given.values()))
    counted = count_as_metal(
        lambda x: PRODUCTS[stem](**given | {"x": x}, kernels=kernels), given["x"]
    )
    assert counted.depth == DEPTHS[stem]["mlx"] + (stem == "norm_qkv_rope")


def test_weights_of_a_step() -> None:
    """Read once for 16 rows; of experts, those that somebody chose."""
    config = MODELS["20b"]
    parts = token_bytes(config, "q8")
    assert batch_weight_bytes(config, "q8", 1) == sum(parts.values())
    assert [passes("unembed", "q8", rows) for rows in (1, 16, 17, 32)] == [1, 1, 2, 2]
    assert [passes("unembed", "plain", rows) for rows in (16, 17, 32)] == [1, 1, 1]
    assert [passes("route", 128, rows) for rows in (1, 16, 17)] == [1, 8, 1]
    assert experts_read(config, 1) == 4
    for rows in (2, 4):  # a block holds them all
        assert experts_read(config, rows) == pytest.approx(32 * (1 - (28 / 32) ** rows))
    assert experts_read(MODELS["120b"], 3) == 12
    assert 32 * (1 - (28 / 32) ** 16) < experts_read(config, 16) < 64


def test_the_same_count_of_mlx_lm() -> None:
    """About 39 kernels a layer, which an independent count found too."""
    counted = mlx_lm_counts(MODELS["20b"], "q8")
    assert 930 <= counted.kernels <= 960
    assert 15 * 24 < counted.depth < 25 * 24


def test_dispatches_of_a_chunk() -> None:
    """At most 21 a layer; mlx-lm launches 42, or so."""
    counts = count_chunks(MODELS["20b"], "q8")
    assert counts["ours"] <= 21 * 24
    assert counts["ours"] < counts["mlx_lm"] < counts["ours_without_kernels"]
    assert 40 * 24 < counts["mlx_lm"] < 45 * 24


def test_kernels_and_chains_are_told_apart() -> None:
    def call(a: mx.array, b: mx.array) -> list[mx.array]:
        side = (mx.sin(a), mx.cos(b))
        return [
            mx.matmul(side[0], side[1].T)
        ]  # sin and cos do not wait for each other; T is a view

    counted = count_traced(call, [mx.zeros((3, 4)), mx.zeros((5, 4))])
    assert (counted.kernels, counted.depth, counted.inputs) == (3, 2, 2)


def test_bytes_of_a_token() -> None:
    """2.57 GB of q8 weights on the 20b; K and V of 12 full layers grow with the context."""
    config = MODELS["20b"]
    assert sum(token_bytes(config, "q8").values()) == pytest.approx(2.568e9, rel=1e-3)
    assert token_bytes(config, "q8")["experts"] == 24 * 4 * 3 * 2880 * (1440 + 90 + 2)
    assert kv_bytes(config, 32768)["full"] == 12 * 32768 * 2 * 8 * 64 * 2
    assert kv_bytes(config, 32768)["sliding"] == 12 * 128 * 2 * 8 * 64 * 2
