"""Whole conversions: the same model comes out of every layout, and mlx-lm reads it as we do."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tiny import Layout, TinyShape, write_checkpoint

from mlx_gptoss.checkpoint import MXFP4, Quantization, open_checkpoint
from mlx_gptoss.config import read_config
from mlx_gptoss.convert import convert_checkpoint, reading, verify
from mlx_gptoss.convert.mxfp4 import decode
from mlx_gptoss.errors import ConversionError, VocabularyError

LAYERS = 3  # an odd count, with both kinds of layers
SHAPE = TinyShape(layers=LAYERS)
TOKENS = [[5, 1, 900, 33, 7, 7, 512, 1023]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    layouts: tuple[Layout, ...] = ("hf", "original", "dense", "resaved")
    for layout in layouts:
        write_checkpoint(root / layout, layout=layout, layers=LAYERS)
    return root


@pytest.fixture(scope="module")
def converted(sources: Path) -> Path:
    """The "hf" source, converted with all defaults."""
    return convert_checkpoint(sources / "hf", sources / "hf-mlx").target


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mlx_gptoss.json").read_text())


def mlx_lm_logits(folder: Path) -> np.ndarray:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def test_mlx_lm_computes_the_same_from_source_and_result(sources: Path, converted: Path) -> None:
    assert np.array_equal(mlx_lm_logits(converted), mlx_lm_logits(sources / "hf"))


@pytest.mark.parametrize("dense", ["q8", "q4"])
def test_mlx_lm_loads_quantised_results(sources: Path, tmp_path: Path, dense: Any) -> None:
    """Its logits are as near those of the source as with its own quantization.

    Logits differ by expert choices that flip, so the weights are compared in test_convert_affine.
    """
    from mlx_lm.utils import load_model, quantize_model

    ours = mlx_lm_logits(convert_checkpoint(sources / "hf", tmp_path / dense, dense=dense).target)
    truth = mlx_lm_logits(sources / "hf")
    model, config = load_model(sources / "hf")
    model, _ = quantize_model(model, config, group_size=64, bits=int(dense[1:]))
    theirs = np.array(model(mx.array(TOKENS)).astype(mx.float32))
    error = [np.square(got - truth).mean() ** 0.5 for got in (ours, theirs)]
    assert error[0] < 1.25 * error[1] < truth.std()


def test_both_published_layouts_give_the_same_bits(sources: Path, converted: Path) -> None:
    original = convert_checkpoint(sources / "original", sources / "original-mlx").target
    assert manifest(original)["tensors"] == manifest(converted)["tensors"]
    weights = {n: f for n, f in manifest(converted)["files"].items() if n.endswith("safetensors")}
    assert weights.items() <= manifest(original)["files"].items()
    assert read_config(original)[0] == read_config(converted)[0]


def test_dense_fine_tunes_are_told_by_dtype(sources: Path, tmp_path: Path) -> None:
    """transformers 5 saves dense experts under `*_blocks` names; mlx-lm fails on their shape."""
    dense = convert_checkpoint(sources / "dense", tmp_path / "dense")
    resaved = convert_checkpoint(sources / "resaved", tmp_path / "resaved")
    assert dense.source == resaved.source == "Hugging Face, bfloat16 experts"
    assert manifest(dense.target)["tensors"] == manifest(resaved.target)["tensors"]
    assert "rope_parameters" not in (resaved.target / "config.json").read_text()
    assert read_config(dense.target)[0] == read_config(resaved.target)[0]
    assert np.isfinite(mlx_lm_logits(resaved.target)).all()


@pytest.mark.parametrize("proj", ["gate_proj", "up_proj", "down_proj"])
def test_dense_experts_stay_within_the_rounding_of_mxfp4(
    sources: Path, tmp_path: Path, proj: str
) -> None:
    target = convert_checkpoint(sources / "dense", tmp_path / "mlx").target
    tensors = open_checkpoint(target).load()
    name = f"model.layers.2.mlp.experts.{proj}"
    blocks, scales = (np.array(tensors[f"{name}.{kind}"]) for kind in ("weight", "scales"))
    got = decode(blocks.view(np.uint8).reshape(*scales.shape, 16), scales)
    whole = "down_proj" if proj == "down_proj" else "gate_up_proj"
    master = tiny.bf16_to_f32(tiny.master_tensors(SHAPE, 0)[f"model.layers.2.mlp.experts.{whole}"])
    wanted = master[
        :, {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}.get(proj, ...)
    ]
    peak = np.abs(wanted).reshape(*scales.shape, 32).max(-1)
    error = np.abs(got - wanted).reshape(*scales.shape, 32).max(-1)
    assert (error <= peak / 4).all()
    assert error.max() > 0


def test_the_same_model_twice_gives_the_same_hashes(sources: Path, converted: Path) -> None:
    again = convert_checkpoint(sources / "hf", sources / "again").target
    assert manifest(again) == manifest(converted)


def test_manifest_and_config(converted: Path) -> None:
    import hashlib

    record = manifest(converted)
    assert record["version"] == 1
    assert record["options"] == {"dense": "bf16"}
    assert record["source"]["layout"] == "Hugging Face, MXFP4 experts"
    assert set(record["files"]) == {p.name for p in converted.iterdir()} - {"mlx_gptoss.json"}
    for name, file in record["files"].items():
        data = (converted / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["nbytes"], file["sha256"])
    checkpoint = open_checkpoint(converted)
    assert set(record["tensors"]) == set(checkpoint.tensors)
    entry = checkpoint.tensors["model.layers.1.mlp.experts.up_proj.weight"]
    data = entry.path.read_bytes()[entry.start : entry.end]
    assert (
        hashlib.sha256(data).hexdigest()
        == record["tensors"]["model.layers.1.mlp.experts.up_proj.weight"]
    )
    config = json.loads((converted / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert config["eos_token_id"] == 1023
    assert {error["max_error"] for error in record["verified"]} == {0.0}


@pytest.mark.parametrize(("dense", "bits"), [("q8", 8), ("q4", 4)])
def test_only_the_dense_matrices_are_quantised(
    sources: Path, tmp_path: Path, dense: Any, bits: int
) -> None:
    report = convert_checkpoint(sources / "original", tmp_path / "mlx", dense=dense)
    checkpoint = open_checkpoint(report.target)
    packed = Quantization(64, bits, "affine")
    layer = "model.layers.1"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert checkpoint.quantization_of(f"{layer}.self_attn.{name}") == packed
    assert checkpoint.quantization_of("model.embed_tokens") == packed
    assert checkpoint.quantization_of("lm_head") == packed
    assert checkpoint.quantization_of(f"{layer}.mlp.router") is None
    assert checkpoint.quantization_of(f"{layer}.mlp.experts.up_proj") == MXFP4
    stated = json.loads((report.target / "config.json").read_text())["quantization"]
    assert stated.pop("lm_head") == {"group_size": 64, "bits": bits, "mode": "affine"}
    assert stated.pop("model.embed_tokens") == {"group_size": 64, "bits": bits, "mode": "affine"}
    assert {name for name in stated if "." in name} == {
        f"model.layers.{n}.self_attn.{x}_proj" for n in range(LAYERS) for x in "qkvo"
    }
    assert report.errors is not None
    bounds = {error.kind: error for error in report.errors}
    assert 0 < bounds["attention"].relative_error <= bounds["attention"].bound == 0.5001
    assert bounds["experts"].max_error == bounds["biases, norms, sinks, router"].max_error == 0


def test_other_files_are_copied(sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "hf", source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not the model's")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04 beside safetensors: left alone")
    target = convert_checkpoint(source, tmp_path / "mlx").target
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (target / "generation_config.json").exists()
    assert not (target / "notes.txt").exists()
    assert not (target / "pytorch_model.bin").exists()


def test_another_tokenizer_is_refused(sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "hf", source)
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(VocabularyError, match=r"tokenizer\.json"):
        convert_checkpoint(source, tmp_path / "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_counts_every_byte(sources: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = convert_checkpoint(
        sources / "hf", tmp_path / "mlx", progress=lambda *args: seen.append(args)
    )
    for phase in ("converting", "verifying"):
        done = [done for name, done, _ in seen if name == phase]
        assert done == sorted(done)
        assert {total for name, _, total in seen if name == phase} == {done[-1]}
        assert done[-1] == report.weight_bytes
    assert 0 < report.convert_s and 0 < report.verify_s and report.resumed_bytes == 0


def test_without_verification(sources: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(sources / "hf", tmp_path / "mlx", verify=False)
    assert (report.errors, report.verify_s) == (None, 0)
    assert manifest(report.target)["verified"] is None


def test_columns_that_do_not_divide_into_groups(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shape=TinyShape(layers=2, hidden=96))
    with pytest.raises(ConversionError, match="96 columns are no multiple of 64, which q8 needs"):
        convert_checkpoint(source, tmp_path / "mlx", dense="q8")
    assert convert_checkpoint(source, tmp_path / "mlx").weight_bytes > 0


def test_unknown_option(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dense: expected one of bf16, q8, q4, got 'int8'"):
        convert_checkpoint(sources / "hf", tmp_path / "mlx", dense="int8")  # type: ignore[arg-type]


def test_converting_needs_no_mlx(sources: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from mlx_gptoss.convert import convert_checkpoint as c; "
        f"c({str(sources / 'dense')!r}, {str(tmp_path / 'mlx')!r}, dense='q4'); "
        "assert 'mlx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("layout", "dense"), [("original", "bf16"), ("hf", "q4"), ("dense", "q8")])
def test_memory_follows_the_piece_and_not_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, dense: Any
) -> None:
    """numpy's memory is traced: the peak stays far below the largest tensor, proof included.

    The same bound for real sizes, in bytes of the whole process, is benchmarks/convert.py's.
    """
    import tracemalloc

    shape = TinyShape(layers=2, vocab=16384)  # an embedding of 6.3 MB
    source = write_checkpoint(tmp_path / "source", layout=layout, shape=shape)
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(verify, "PIECE_BYTES", 1 << 16)
    tracemalloc.start()
    try:
        convert_checkpoint(source, tmp_path / "mlx", dense=dense)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3_000_000
