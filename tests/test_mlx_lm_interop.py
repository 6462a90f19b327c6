"""Our folders in mlx-lm and its folders here: the same logits from both runtimes.

Comparing needs a config that both understand: mlx-lm ignores `truncate: false`, so these
checkpoints say `true`, and the rest of the computation must then agree to float32 rounding.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import TinyShape, hf_config, write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.model import load_model

SHAPE = TinyShape(layers=2)
TOKENS = mx.array([[*range(3, 150)]])  # past the window of 128
DENSE = {"bf16": {}, "q8": {"group_size": 64, "bits": 8}, "q4": {"group_size": 64, "bits": 4}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = hf_config(SHAPE)["rope_scaling"] | {"truncate": True}
    folder = tmp_path_factory.mktemp("interop") / "source"
    return write_checkpoint(folder, shape=SHAPE, config={"rope_scaling": rope})


def mlx_lm_folder(source: Path, folder: Path, options: dict[str, Any]) -> Path:
    """What `mlx_lm.convert` writes, with `-q` where there are options, less the tokenizer."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source, lazy=True)
    if options:
        model, config = quantize_model(model, config, **options)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def mlx_lm_logits(folder: Path) -> np.ndarray:
    """mlx-lm's logits in float32, weights widened exactly."""
    from mlx_lm.utils import load_model as load

    model, _ = load(folder)
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))


def our_logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")(TOKENS))


@pytest.mark.parametrize("dense", ["bf16", "q8", "q4"])
@pytest.mark.parametrize("writer", ["ours", "mlx-lm"])
def test_both_runtimes_agree_on_both_folders(
    source: Path, tmp_path: Path, writer: str, dense: Any
) -> None:
    if writer == "ours":
        folder = convert_checkpoint(source, tmp_path / "folder", dense=dense).target
    else:
        folder = mlx_lm_folder(source, tmp_path / "folder", DENSE[dense])
    ours, theirs = our_logits(folder), mlx_lm_logits(folder)
    assert ours.std() > 1
    assert np.abs(ours - theirs).max() <= 1e-4


def test_bf16_conversions_are_the_same_model(source: Path, tmp_path: Path) -> None:
    ours = convert_checkpoint(source, tmp_path / "ours").target
    theirs = mlx_lm_folder(source, tmp_path / "theirs", {})
    assert np.array_equal(our_logits(ours), our_logits(theirs))
