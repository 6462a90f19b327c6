"""Bad input: one line that says what is wrong, and nothing left behind."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from tiny import Layout, write_checkpoint, write_safetensors

from mlx_gptoss.convert import convert_checkpoint, pipeline, verify
from mlx_gptoss.errors import ConfigError, ConversionError, GptOssError, VerificationError
from mlx_gptoss.weight_files import INDEX, read_tensors

SHARD = "model-00001-of-00002.safetensors"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    layouts: tuple[Layout, ...] = ("hf", "original", "dense")
    for layout in layouts:
        write_checkpoint(root / layout, layout=layout, layers=2)
    return root


@pytest.fixture
def source(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the Hugging Face layout, to damage."""
    return Path(shutil.copytree(checkpoints / "hf", tmp_path / "source"))


def edit_json(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def overwrite(folder: Path, name: str, data: bytes, *, at: int = 0) -> None:
    """Change bytes of one tensor in its file."""
    entry = read_tensors(folder)[name]
    with entry.path.open("r+b") as file:
        file.seek(entry.start + at)
        file.write(data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a file, at the same length."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(data[:8] + text + data[8 + length :])


# ---- folders and configs


def test_source_that_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: not a folder", ConversionError)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file: not a folder", ConversionError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: no such file", ConfigError)


def test_config_of_another_model(source: Path) -> None:
    edit_json(source / "config.json", model_type="llama")
    refused(source, "model_type: expected 'gpt_oss', got 'llama'", ConfigError)


def test_config_of_another_size(source: Path) -> None:
    edit_json(source / "config.json", hidden_size=256)
    refused(source, "embed_tokens.weight: expected BF16 [1024, 256], got BF16 [1024, 192]")


def test_config_with_another_quantization(source: Path) -> None:
    edit_json(source / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(source, "expected 'mxfp4', got 'bitsandbytes'", ConversionError)


def test_config_with_duplicate_keys(source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"vocab_size": 7,', 1))
    refused(source, "the key 'vocab_size' occurs twice", GptOssError)


def test_folder_above_the_original_layout(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "original", tmp_path / "source" / "original")
    message = f"convert {tmp_path / 'source' / 'original'} instead"
    refused(tmp_path / "source", message, ConversionError)


def test_folder_that_is_converted_already(checkpoints: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoints / "hf", tmp_path / "source")
    refused(tmp_path / "source", "already in the converted format", ConversionError)


def test_pickle_files_are_never_read(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(source, "pytorch_model.bin is a pickle file, which can run code and is never read")


# ---- weight files


def test_truncated_shard(source: Path) -> None:
    path = source / SHARD
    os.truncate(path, path.stat().st_size - 1)
    refused(source, f"{SHARD}: truncated: expected")


def test_shard_with_a_huge_header(source: Path) -> None:
    (source / SHARD).write_bytes(b"\xff" * 64)
    refused(source, "its header claims 18446744073709551615 bytes")


def test_index_naming_a_missing_file(source: Path) -> None:
    (source / SHARD).unlink()
    refused(source, f"lists {SHARD}, which is missing")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd"])
def test_index_naming_a_file_elsewhere(source: Path, file: str) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (source / INDEX).write_text(json.dumps(index))
    refused(source, f"lm_head.weight: expected the name of a file in this folder, got {file!r}")


def test_shard_that_cannot_be_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    refused(source, "cannot be read: Input/output error")


def test_shard_without_permission(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, for whom every file is readable."""
    real = Path.open

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == SHARD and not kwargs:  # `everything` reads with keywords
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    refused(source, f"{SHARD}: cannot be read: Permission denied")


def test_shard_that_shrinks_during_the_conversion(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (source / SHARD).stat().st_size
    real = os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        return real(descriptor, min(count, max(0, size // 2 - offset)), offset)

    monkeypatch.setattr(os, "pread", pread)
    refused(source, "the file has changed since the conversion began")


# ---- tensors


def test_missing_tensor(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    file = index["weight_map"].pop("lm_head.weight")
    (source / INDEX).write_text(json.dumps(index))

    def rename(header: dict[str, Any]) -> None:
        header["xx_head.weight"] = header.pop("lm_head.weight")

    edit_header(source / file, rename)
    refused(source, "holds xx_head.weight, which the index lists nowhere")
    index["weight_map"]["xx_head.weight"] = file
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "lm_head.weight is missing, expected BF16 [1024, 192]")


def test_extra_tensor(source: Path) -> None:
    edit_json(source / "config.json", num_hidden_layers=1, layer_types=["sliding_attention"])
    refused(source, "model.layers.1.input_layernorm.weight: no such tensor in this model")


def test_misshaped_tensor(source: Path) -> None:
    file = json.loads((source / INDEX).read_text())["weight_map"]["lm_head.weight"]
    edit_header(source / file, lambda h: h["lm_head.weight"].update(shape=[192, 1024]))
    refused(source, "lm_head.weight: expected BF16 [1024, 192], got BF16 [192, 1024]")


def test_wrong_dtype(source: Path) -> None:
    file = json.loads((source / INDEX).read_text())["weight_map"]["lm_head.weight"]
    edit_header(source / file, lambda h: h["lm_head.weight"].update(dtype="F16"))
    refused(source, "lm_head.weight: expected BF16 [1024, 192], got F16 [1024, 192]")


def test_dense_and_packed_experts_mixed(source: Path, checkpoints: Path) -> None:
    """A dense tensor makes the checkpoint dense; blocks beside it are then of the wrong shape."""
    dense = read_tensors(checkpoints / "dense")
    name = f"{GATE_UP}_blocks"
    entry = dense[GATE_UP]
    tensor = {name: np.fromfile(entry.path, np.uint16, entry.spec.nbytes // 2, offset=entry.start)}
    tensor[name] = tensor[name].reshape(entry.shape)
    write_safetensors(source / "dense.safetensors", tensor)
    index = json.loads((source / INDEX).read_text())
    old = source / index["weight_map"][name]
    index["weight_map"][name] = "dense.safetensors"

    def rename(header: dict[str, Any]) -> None:
        header[name.replace("gate_up", "gate-up")] = header.pop(name)

    edit_header(old, rename)
    index["weight_map"][name.replace("gate_up", "gate-up")] = old.name
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "expected BF16 [12, 192, 320], got U8 [12, 320, 6, 16]")


@pytest.mark.parametrize(
    "bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF], ids=["inf", "-inf", "nan", "-nan"]
)
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", f"{GATE_UP}_bias", "model.norm.weight", "model.layers.0.self_attn.sinks"],
)
def test_weights_that_are_no_numbers(source: Path, name: str, bits: int) -> None:
    last = read_tensors(source)[name].spec.nbytes - 2
    overwrite(source, name, struct.pack("<H", bits), at=last)
    refused(source, f"{name}: a weight is NaN or infinite")


def test_dense_experts_that_are_no_numbers(checkpoints: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoints / "dense", tmp_path / "source"))
    overwrite(source, GATE_UP, b"\x80\xff", at=read_tensors(source)[GATE_UP].spec.nbytes - 2)
    refused(source, f"{GATE_UP}_blocks: a weight is NaN or infinite")


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_scale_byte_255(checkpoints: Path, tmp_path: Path, layout: str) -> None:
    source = Path(shutil.copytree(checkpoints / layout, tmp_path / "source"))
    name = {"hf": f"{GATE_UP}_scales", "original": "block.1.mlp.mlp1_weight.scales"}[layout]
    overwrite(source, name, b"\xff", at=12 * 320 * 6 - 1)
    refused(source, f"{name}: a scale byte is 255, which is NaN in MXFP4")


def test_block_bytes_may_be_anything(source: Path, tmp_path: Path) -> None:
    overwrite(source, f"{GATE_UP}_blocks", b"\xff" * 1000)
    convert_checkpoint(source, tmp_path / "mlx")


# ---- verification


@pytest.mark.parametrize("layout", ["hf", "original", "dense"])
@pytest.mark.parametrize(
    ("dense", "name", "fault"),
    [
        ("bf16", "lm_head.weight", "rows 0 to"),
        ("bf16", "model.layers.1.self_attn.v_proj.weight", "differ from the source"),
        ("bf16", "model.layers.1.self_attn.k_proj.bias", "differ from the source"),
        ("bf16", "model.layers.0.mlp.experts.up_proj.weight", "differ from the source"),
        ("bf16", "model.layers.0.mlp.experts.down_proj.scales", "differ from the source"),
        ("bf16", "model.layers.0.mlp.experts.gate_proj.bias", "differ from the source"),
        ("q8", "model.layers.1.self_attn.v_proj.weight", "differ from the source"),
        ("q4", "model.embed_tokens.scales", "differ from the source"),
        ("q4", "lm_head.biases", "differ from the source"),
        ("q8", "model.layers.1.mlp.router.weight", "differ from the source"),
    ],
)
def test_verification_finds_a_changed_byte(
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    dense: Any,
    name: str,
    fault: str,
) -> None:
    """Bytes flip between writing and proving; every kind of tensor is looked at."""
    real = pipeline.verify_conversion

    def flip(source: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        entry = tensors[name]
        data = bytearray(entry.path.read_bytes())
        middle = (entry.start + entry.end) // 4 * 2 + 1  # the high byte of a bfloat16
        data[middle] ^= 0x41
        entry.path.write_bytes(data)
        return real(source, tensors, *args, **kwargs)

    monkeypatch.setattr(pipeline, "verify_conversion", flip)
    with pytest.raises(VerificationError, match=fault):
        convert_checkpoint(checkpoints / layout, tmp_path / "mlx", dense=dense)
    assert list(tmp_path.iterdir()) == []


def test_verification_reads_the_disk_where_it_can(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system offers no way to drop cached pages")
    advised: list[int] = []
    monkeypatch.setattr(
        verify.os, "posix_fadvise", lambda fd, start, size, advice: advised.append(advice)
    )
    convert_checkpoint(source, source.parent / "mlx")
    assert advised == [os.POSIX_FADV_DONTNEED] * 4
