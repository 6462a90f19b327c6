"""Converted folders, mlx-lm's own among them: opened when right, refused by name when not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyShape, hf_tensors, write_checkpoint, write_safetensors

from mlx_gptoss.checkpoint import (
    MXFP4,
    Checkpoint,
    Quantization,
    expected_tensors,
    linear_modules,
    open_checkpoint,
)
from mlx_gptoss.config import GPT_OSS_20B, read_config
from mlx_gptoss.errors import CheckpointError, ConfigError
from mlx_gptoss.model import load_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.experts.gate_proj"
ROUTER = "model.layers.0.mlp.router"


def mlx_lm_conversion(source: Path, target: Path, **options: Any) -> Path:
    """What `mlx_lm.convert` writes, with `-q` where there are options, less the tokenizer."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source, lazy=True)
    if options:
        model, config = quantize_model(model, config, **options)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder in the converted format, written by mlx-lm."""
    root = tmp_path_factory.mktemp("checkpoint")
    source = write_checkpoint(root / "source", layers=2)
    return mlx_lm_conversion(source, root / "mlx")


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in converted.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("options", "packing", "router"),
    [
        ({}, None, None),
        ({"group_size": 64, "bits": 8}, Quantization(64, 8, "affine"), 8),
        ({"group_size": None, "bits": None}, Quantization(64, 4, "affine"), 8),
        ({"group_size": 32, "bits": 3}, Quantization(32, 3, "affine"), 8),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, MXFP4, 8),
    ],
    ids=["bf16", "q8", "q4", "q3", "mxfp4"],
)
def test_mlx_lm_conversions_open_and_load(
    tmp_path: Path,
    options: dict[str, Any],
    packing: Quantization | None,
    router: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """mlx-lm packs the router too, at 8 bits whatever was asked, and names no experts."""
    source = write_checkpoint(tmp_path / "source", layers=2)
    folder = mlx_lm_conversion(source, tmp_path / "mlx", **options)
    checkpoint = open_checkpoint(folder)
    assert load_model(folder).config == checkpoint.config
    assert checkpoint.quantization_of(GATE) == MXFP4
    assert checkpoint.quantization_of(Q_PROJ) == packing
    assert checkpoint.quantization_of("model.embed_tokens") == packing
    expected = router and Quantization(64, router, "affine")
    assert checkpoint.quantization_of(ROUTER) == expected
    assert checkpoint.manifest is None
    arrays = checkpoint.load()
    specs = expected_tensors(checkpoint.config, checkpoint.quantization)
    assert {name: array.shape for name, array in arrays.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    assert checkpoint.nbytes == sum(array.nbytes for array in arrays.values())


def test_expected_tensors_of_the_published_model() -> None:
    experts = {m: MXFP4 for m in linear_modules(GPT_OSS_20B) if ".experts." in m}
    specs = expected_tensors(GPT_OSS_20B, experts)
    assert len(specs) == 24 * 22 + 3
    assert str(specs[f"{GATE}.weight"]) == "U32 [32, 2880, 360]"
    assert str(specs[f"{GATE}.scales"]) == "U8 [32, 2880, 90]"
    assert str(specs["lm_head.weight"]) == "BF16 [201088, 2880]"
    assert sum(spec.nbytes for spec in specs.values()) == 13_761_264_768


def test_source_layouts_are_named_as_such(tmp_path: Path) -> None:
    for layout in ("hf", "original", "dense", "resaved"):
        source = write_checkpoint(tmp_path / layout, layout=layout, layers=1)
        with pytest.raises(CheckpointError, match=f"mlx-gptoss convert {source} TARGET"):
            open_checkpoint(source)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: not a folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ConfigError, match="no such file"):
        open_checkpoint(tmp_path)


def test_config_of_another_size(folder: Path) -> None:
    edit_config(folder, intermediate_size=192)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    expected = f"{GATE}.weight: expected U32 [12, 192, 24], got U32 [12, 160, 24]; the weights"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"lm_head": {"group_size": 48, "bits": 4}}, "lm_head: expected MXFP4 or affine"),
        ({"lm_head": {"group_size": 64, "bits": 7}}, "lm_head: expected MXFP4 or affine"),
        ({"lm_head": {"group_size": 128, "bits": 4}}, "groups that divide 192 columns"),
        ({"lm_head": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}, "'mode': 'nvfp4'"),
        ({"lm_head": {"group_size": 64, "bits": 4}}, "lm_head.weight: expected U32 [1024, 24]"),
        (7, "quantization: expected a JSON object, got 7"),
    ],
)
def test_quantization_that_cannot_be(folder: Path, quantization: Any, message: str) -> None:
    edit_config(folder, quantization=quantization)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("version", "message"), [(2, "format version 2, this package reads 1"), (None, "version None")]
)
def test_manifest_of_another_version(folder: Path, version: Any, message: str) -> None:
    (folder / "mlx_gptoss.json").write_text(json.dumps({"version": version}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)
    assert "run `mlx-gptoss convert` again" in str(caught.value)


GOOD_MANIFEST: dict[str, Any] = {
    "version": 1,
    "converter": "mlx-gptoss 0",
    "source": {"folder": "src", "revision": None, "layout": "x"},
    "options": {"dense": "bf16"},
    "files": {"config.json": {"nbytes": 3, "sha256": "ab"}},
    "tensors": {"lm_head.weight": "cd"},
    "verified": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": None}, "files: expected a JSON object, got None"),
        ({"files": []}, "files: expected a JSON object, got []"),
        ({"files": {"x": 1}}, "files.x: expected nbytes and sha256, got 1"),
        ({"files": {"/etc/passwd": {"nbytes": 1, "sha256": ""}}}, "a file in this folder"),
        ({"files": {"../x": {"nbytes": 1, "sha256": ""}}}, "a file in this folder"),
        ({"files": {"x": {"nbytes": -1, "sha256": ""}}}, "files.x: expected nbytes and sha256"),
        ({"source": {}}, "source.folder: expected a string, got None"),
        ({"options": {"dense": 7}}, "options.dense: expected a string, got 7"),
        ({"tensors": {"a": 1}}, "tensors.a: expected a sha256, got 1"),
        ({"verified": 1}, "verified: expected a list or null, got 1"),
        ({"converter": 3}, "converter: expected a string, got 3"),
    ],
)
def test_damaged_manifest(folder: Path, change: dict[str, Any], message: str) -> None:
    """Only the version was checked: what used the other fields met a KeyError."""
    path = folder / "mlx_gptoss.json"
    path.write_text(json.dumps(GOOD_MANIFEST))
    assert open_checkpoint(folder).manifest == GOOD_MANIFEST
    path.write_text(json.dumps(GOOD_MANIFEST | change))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)
    assert "convert again" in str(caught.value)


def test_null_quantization_is_none(folder: Path) -> None:
    """Some writers state an absent block as null; the packing then follows from the shapes."""
    before = open_checkpoint(folder).quantization
    edit_config(folder, quantization=None)
    assert open_checkpoint(folder).quantization == before


def rewritten(folder: Path, **changes: np.ndarray | None) -> None:
    """Replace the weights by a file in which some tensors are changed, added or removed."""
    tensors = dict(numpy_tensors(open_checkpoint(folder)))
    for name, array in changes.items():
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    (folder / "model.safetensors.index.json").unlink()
    write_safetensors(folder / "model.safetensors", tensors)


def numpy_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    dtypes = {"BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}
    return {
        name: np.memmap(e.path, dtypes[e.dtype], "c", offset=e.start, shape=e.shape).copy()
        for name, e in checkpoint.tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("lm_head.weight", None, "lm_head.weight is missing, expected BF16 [1024, 192]"),
        ("lm_head.bias", np.zeros(4, np.uint16), "lm_head.bias: no such tensor in this model"),
        ("model.norm.weight", np.zeros(9, np.uint16), "expected BF16 [192], got BF16 [9]"),
        ("model.norm.weight", np.zeros(192, np.float32), "expected BF16 [192], got F32 [192]"),
        ("model.norm.scales", np.zeros(192, np.uint8), "model.norm.scales: no such tensor"),
        (f"{Q_PROJ}.weight", None, f"{Q_PROJ}.weight is missing"),
        (f"{GATE}.weight", None, f"{GATE}.weight is missing, expected U32 [12, 160, 24]"),
        (f"{GATE}.scales", None, f"{GATE}.weight: expected BF16 [12, 160, 192], got U32"),
        ("lm_head.scales", np.zeros((1024, 2), np.uint16), "'group_size': 96, 'bits': 32"),
        ("lm_head.scales", np.zeros((), np.uint16), "lm_head.scales has no weight to scale"),
    ],
)
def test_wrong_tensors(folder: Path, name: str, array: Any, message: str) -> None:
    rewritten(folder, **{name: array})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


def test_loaded_arrays_hold_the_bytes_of_the_files(folder: Path) -> None:
    import mlx.core as mx

    checkpoint = open_checkpoint(folder)
    arrays, raw = checkpoint.load(), numpy_tensors(checkpoint)
    for name, array in arrays.items():
        bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        assert np.array_equal(np.array(bits), raw[name]), name
    source = hf_tensors(TinyShape(layers=2), 0)
    assert np.array_equal(raw[f"{GATE}.bias"], source[f"{GATE[:-9]}gate_up_proj_bias"][:, ::2])


def test_config_reads_back(folder: Path) -> None:
    assert open_checkpoint(folder).config == read_config(folder)[0]
