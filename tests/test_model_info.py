"""What a folder holds: sizes that add up, formats by part, and hashes that catch a changed byte."""

from pathlib import Path

import pytest
from tiny import write_checkpoint

from mlx_gptoss.checkpoint import Checkpoint, open_checkpoint
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import CheckpointError, VerificationError
from mlx_gptoss.manifest import MANIFEST
from mlx_gptoss.model_info import check_hashes, parts


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source", layers=2)
    convert_checkpoint(source, tmp_path / "model", dense="q8")
    return tmp_path / "model"


def test_parts_add_up_and_name_their_formats(converted: Path) -> None:
    checkpoint = open_checkpoint(converted)
    found = parts(checkpoint)
    assert sum(part.nbytes for part in found.values()) == checkpoint.nbytes
    affine = ("affine 8-bit in groups of 64",)
    assert {name: part.stored_as for name, part in found.items()} == {
        "experts": ("mxfp4",),
        "attention": affine,
        "embedding": affine,
        "unembedding": affine,
        "router": ("bfloat16",),
        "norms": ("bfloat16",),
    }
    sizes = [part.nbytes for part in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    c = checkpoint.config
    assert found["router"].nbytes == 2 * c.num_hidden_layers * c.num_local_experts * (
        c.hidden_size + 1
    )


def test_hashes_are_those_of_the_manifest(converted: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    names = check_hashes(open_checkpoint(converted), progress=lambda *at: seen.append(at))
    assert set(names) == {p.name for p in converted.iterdir()} - {MANIFEST}
    size = sum((converted / name).stat().st_size for name in names)
    assert seen[-1] == ("checking hashes", size, size)


def test_a_changed_byte_is_found(converted: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(converted)
    file = next(converted.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerificationError, match=rf"{file.name}: expected sha256 .*, got .*changed"):
        check_hashes(checkpoint)
    file.unlink()
    with pytest.raises(VerificationError, match=rf"{file.name}: cannot be read: No such file"):
        check_hashes(checkpoint)


def test_without_a_manifest_there_is_nothing_to_compare_with(converted: Path) -> None:
    (converted / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no manifest with hashes, another tool wrote this"):
        check_hashes(open_checkpoint(converted))
