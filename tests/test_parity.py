"""Against transformers: the same logits, at every position, where mlx-lm and llama.cpp differ.

The goldens hold what transformers computed in float32 (tests/goldens/make_parity.py); the
checkpoint is remade from its seed, converted by our converter, and loaded.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from parity import GOLDENS, LONG, SEED, SHAPE, SHORT, compare, prompt
from tiny import Layout, write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.model import load_model

FIGURES = json.loads((GOLDENS / "parity.json").read_text())


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "parity.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """The golden checkpoint, converted from both published layouts."""
    converted: dict[Layout, Path] = {}
    for layout in ("hf", "original"):
        home = tmp_path_factory.mktemp(layout)
        source = write_checkpoint(home / "source", layout=layout, shape=SHAPE, seed=SEED)
        convert_checkpoint(source, home / "converted")
        converted[layout] = home / "converted"
    return converted


def logits_of(folder: Path, count: int, *, dtype: str, chunk: int) -> np.ndarray:
    """Logits of the first `count` tokens of the golden text, (T, V)."""
    model = load_model(folder, dtype=dtype)  # pyright: ignore[reportArgumentType]
    tokens, cache = mx.array(prompt(count)[None]), model.make_cache()
    parts = [
        np.array(model(tokens[:, start : start + chunk], cache)[0])
        for start in range(0, count, chunk)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_float32_equals_transformers(
    folders: dict[Layout, Path], truth: dict[str, np.ndarray], layout: Layout
) -> None:
    got = compare(
        truth["short_logits"], logits_of(folders[layout], SHORT, dtype="float32", chunk=SHORT)
    )
    assert got["max_difference"] <= 1e-4, got
    assert got["kl"] <= 1e-9, got
    assert got["top1"] == 1, got


def test_both_layouts_give_the_same_bits(folders: dict[Layout, Path]) -> None:
    a, b = (logits_of(folders[layout], 40, dtype="float32", chunk=40) for layout in folders)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [127, 128, 129, 130])
def test_prompts_that_end_at_the_window(
    folders: dict[Layout, Path], truth: dict[str, np.ndarray], count: int
) -> None:
    logits = logits_of(folders["hf"], count, dtype="float32", chunk=count)
    assert np.abs(logits - truth["short_logits"][:count]).max() <= 1e-4


def test_token_by_token_equals_transformers(
    folders: dict[Layout, Path], truth: dict[str, np.ndarray]
) -> None:
    logits = logits_of(folders["hf"], 140, dtype="float32", chunk=1)
    assert np.abs(logits - truth["short_logits"][:140]).max() <= 1e-4


def test_long_text_equals_transformers(
    folders: dict[Layout, Path], truth: dict[str, np.ndarray]
) -> None:
    """6,000 tokens, in chunks: past 4,096 mlx-lm agrees on the best token in 71 % of positions.

    transformers forms its angles in float32; with exact ones its KL falls a hundredfold.
    """
    logits = logits_of(folders["hf"], LONG, dtype="float32", chunk=1000)
    got = compare(truth["long_logits"], logits[truth["long_positions"]])
    assert got["kl"] <= 1e-7, got
    np.testing.assert_array_equal(logits.argmax(-1), truth["long_best"])
    exact = compare(truth["long_exact_logits"], logits[truth["long_positions"]])
    assert exact["max_difference"] <= 2e-4, exact
    assert exact["kl"] <= 1e-10, exact
    peer = FIGURES["long"]["mlx-lm float32, by position"]["4096-6000"]
    assert peer["top1"] < 0.75, "the README's figure"


def test_bfloat16_is_no_worse_than_transformers_own(
    folders: dict[Layout, Path], truth: dict[str, np.ndarray]
) -> None:
    got = compare(
        truth["short_logits"], logits_of(folders["hf"], SHORT, dtype="bfloat16", chunk=SHORT)
    )
    theirs = FIGURES["short"]["transformers bfloat16"]
    assert got["kl"] <= theirs["kl"], (got, theirs)
