"""Dispatches and bytes of a token, counted in the graph that MLX traces for the real sizes."""

import pytest

from benchmarks.decode_card import MODELS, count_chunks, count_ours, kv_bytes, token_bytes
from benchmarks.graph import mlx_lm_counts
from mlx_gptoss.config import FULL
from mlx_gptoss.dispatches import count_traced


@pytest.mark.parametrize(("model", "dense", "kernels"), [("20b", "q8", 159), ("120b", "bf16", 237)])
def test_dispatches_of_a_token(model: str, dense: str, kernels: int) -> None:
    """6 in a sliding layer, 7 in a full one, 3 besides, and nothing MLX adds: no copy, no view."""
    counted = count_ours(MODELS[model], dense)
    full = sum(kind == FULL for kind in MODELS[model].layer_types)
    assert kernels == 6 * MODELS[model].num_hidden_layers + full + 3
    assert (counted.kernels, counted.depth) == (kernels, kernels)


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
    import mlx.core as mx

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
