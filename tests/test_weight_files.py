"""Headers and indexes: read as the safetensors library reads them, refused when damaged."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny import write_checkpoint

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weight_files import (
    INDEX,
    TensorSpec,
    parse_json,
    read_json,
    read_safetensors_header,
    read_tensors,
    safetensors_header,
)


def write_raw(path: Path, header: Any, data_bytes: int) -> Path:
    """A file with any header, valid or not; bytes are written as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))
    return path


def tensor(shape: list[Any], start: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_header_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", layers=3)
    for path in source.glob("*.safetensors"):
        ours = read_safetensors_header(path)
        data = path.read_bytes()
        with safe_open(path, "np") as theirs:
            assert set(ours) == set(theirs.keys())
            for name, entry in ours.items():
                piece = theirs.get_slice(name)
                assert (entry.dtype, list(entry.shape)) == (piece.get_dtype(), piece.get_shape())
                if entry.dtype == "U8":  # numpy has no bfloat16 for the library to return
                    assert data[entry.start : entry.end] == theirs.get_tensor(name).tobytes()


def test_written_header_is_read_back(tmp_path: Path) -> None:
    specs = {
        "b": TensorSpec((2, 3), "U32"),
        "a": TensorSpec((5,), "BF16"),
        "e": TensorSpec((0,), "U8"),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_header(specs) + bytes(24 + 10))
    entries = read_safetensors_header(path)
    assert {name: entry.spec for name, entry in entries.items()} == specs
    assert entries["b"].start % 8 == 0
    with safe_open(path, "np") as theirs:
        assert theirs.get_slice("b").get_shape() == [2, 3]


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        ({"a": tensor([4], 0, 4)}, 3, "truncated: expected"),
        ({"a": tensor([4], 0, 4)}, 5, "1 bytes after the last tensor"),
        ({"a": tensor([4], 0, 4), "b": tensor([2], 3, 5)}, 5, "b: overlaps the tensor before it"),
        ({"a": tensor([4], 0, 4), "b": tensor([2], 5, 7)}, 7, "b: follows a gap"),
        ({"a": tensor([4], 0, 5)}, 5, "U8 [4] takes 4 bytes, its data_offsets [0, 5] give 5"),
        ({"a": tensor([4], 4, 0)}, 4, "give -4"),
        ({"a": tensor([4], 0, 4, "Q4")}, 4, "unknown dtype 'Q4'"),
        ({"a": tensor([4], 0, 4, ["U8"])}, 4, "unknown dtype ['U8']"),
        ({"a": tensor([-4], 0, 4)}, 4, "expected a shape of whole numbers, got [-4]"),
        ({"a": tensor([True], 0, 1)}, 1, "expected a shape of whole numbers, got [True]"),
        ({"a": tensor([4], 0, 4.0)}, 4, "expected two data_offsets, got [0, 4.0]"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "expected dtype, shape and data_offsets"),
        ({"a": 3}, 4, "expected dtype, shape and data_offsets, got 3"),
        ([1], 0, "expected a JSON object, got list"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"{", 0, "not valid JSON"),
        (b"[" * 200_000, 0, "not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, "the key 'a' occurs twice"),
    ],
)
def test_damaged_header_is_refused(
    tmp_path: Path, header: Any, data_bytes: int, message: str
) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data_bytes)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"1234567", "7 bytes are no safetensors file"),
        (struct.pack("<Q", 2**62), "claims 4611686018427387904 bytes, expected at most 100000000"),
        (struct.pack("<Q", 100) + b"{}", "truncated in its header: expected at least 108 bytes"),
    ],
)
def test_damaged_length_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        read_safetensors_header(path)
    assert message in str(caught.value)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Flipped, cut and repeated bytes raise our error, or leave a header that fits the file."""
    path = write_raw(
        tmp_path / "x.safetensors",
        {"a": tensor([2, 3], 0, 12, "BF16"), "b": tensor([4], 12, 16), "__metadata__": {"k": "v"}},
        16,
    )
    whole, rng = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged))
            kind = rng.choice(["flip", "cut", "repeat", "digit"])
            if kind == "flip":
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == "cut":
                del damaged[at : at + rng.randint(1, 9)]
            elif kind == "repeat":
                damaged[at:at] = damaged[at : at + rng.randint(1, 9)]
            else:
                damaged[at] = rng.choice(b'0123456789{}[],:"-e.')
        path.write_bytes(damaged)
        try:
            entries = read_safetensors_header(path)
        except CheckpointError:
            refused += 1
            continue
        assert all(entry.end <= len(damaged) for entry in entries.values())
    assert refused > 600


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.safetensors: cannot be read: Is a dir"):
        read_safetensors_header(tmp_path / "folder.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read: No such file"):
        read_json(tmp_path / "none.json")


def test_duplicate_keys_are_refused_at_any_depth() -> None:
    with pytest.raises(CheckpointError, match="x: the key 'k' occurs twice"):
        parse_json(b'{"a": {"k": 1, "k": 1}}', "x")


# ---- folders


def edit_index(folder: Path, name: str, file: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", 7, "a\\b"]
)
def test_index_may_not_point_out_of_the_folder(tmp_path: Path, file: Any) -> None:
    source = write_checkpoint(tmp_path / "source", layers=1)
    edit_index(source, "lm_head.weight", file)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(source)
    assert "lm_head.weight: expected the name of a file in this folder" in str(caught.value)


def test_index_naming_a_missing_file(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", layers=1)
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-00001-of-00002\.\w+, which is missing"):
        read_tensors(source)


def test_index_naming_a_tensor_that_its_file_lacks(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", layers=1)
    edit_index(source, "ghost", "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="ghost is missing, although the index lists it"):
        read_tensors(source)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", layers=1)
    edit_index(source, "model.embed_tokens.weight", "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.embed_tokens\.weight, which the i"):
        read_tensors(source)


def test_index_without_a_map(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="expected a weight_map"):
        read_tensors(tmp_path)


def test_stale_shards_are_not_merged(tmp_path: Path) -> None:
    """mlx-lm merges every model*.safetensors of a folder, also those of an earlier download."""
    source = write_checkpoint(tmp_path / "source", layers=1)
    before = read_tensors(source)
    shard = source / "model-00001-of-00002.safetensors"
    (source / "model-00099-of-00099.safetensors").write_bytes(shard.read_bytes())
    (source / "model-00098-of-00099.safetensors").write_bytes(b"half a download")
    assert read_tensors(source) == before


def test_links_as_the_hub_stores_files_are_followed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "blobs", layers=1)
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in source.iterdir():
        os.symlink(path, links / path.name)
    assert set(read_tensors(links)) == set(read_tensors(source))


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors files"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle file"):
        read_tensors(tmp_path)
    for n in (1, 2):
        write_raw(tmp_path / f"model-{n}.safetensors", {}, 0)
    with pytest.raises(CheckpointError, match=r"2 safetensors files but no model\.safetensors\.in"):
        read_tensors(tmp_path)
