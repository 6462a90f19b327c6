"""Safetensors files: a strict reader of their headers and index, and the header of a new file.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes; a
folder of several has an index. This module knows nothing of models. It exists beside the
`safetensors` library because a converter needs byte offsets, not arrays, and because a damaged
file must be refused before its first tensor is used, with its name and the place of the damage.

Format: the README of github.com/huggingface/safetensors.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import CheckpointError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must be: its shape, and its dtype as safetensors spells it ("BF16")."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: a file, and the span of its bytes from the start of that file."""

    path: Path
    spec: TensorSpec
    start: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.spec.shape

    @property
    def dtype(self) -> str:
        """The dtype, as safetensors spells it."""
        return self.spec.dtype


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one file; no tensor is read.

    Every tensor's span must fit its dtype and shape, and the spans must cover the rest of the file
    exactly: no gap, no overlap, no missing end.

    Args:
        path: A `.safetensors` file.

    Returns:
        Tensor name to entry, in the order of the bytes.

    Raises:
        CheckpointError: The file cannot be read, is damaged, or is truncated.
    """
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            header = _read_header_text(file.read(8), file, file_bytes, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    raw = parse_json(header, str(path))
    raw.pop("__metadata__", None)
    base = 8 + len(header)
    entries = {name: _read_entry(path, name, raw[name], base) for name in raw}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_spans(ordered, path, base, file_bytes)
    return ordered


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Find every tensor of a folder, of any layout, from the headers of its files.

    An index is authoritative: files that it does not name are not read, so shards left over from
    another version are not merged. It may name plain file names only; that such a file is a link
    is allowed, because the hub's cache stores all files so.

    Raises:
        CheckpointError: There are no safetensors, the index is wrong, or a file is damaged.
    """
    if not (folder / INDEX).exists():
        return read_safetensors_header(_single_file(folder))
    weight_map = _read_index(folder / INDEX)
    headers = {
        file: read_safetensors_header(folder / file) for file in sorted({*weight_map.values()})
    }
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                listed = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(
                    f"{folder / file}: holds {name}, which the index lists {listed}; "
                    "the files are of different versions"
                )
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{folder / file}: {name} is missing, although the index lists it; "
                "download it again"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def safetensors_header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """The length and header of a file whose tensors follow in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, spec in tensors.items():
        span = [offset, offset := offset + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, refusing duplicate keys.

    Raises:
        CheckpointError: The file cannot be read or is not a JSON object with unique keys.
    """
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing keys that occur twice.

    Raises:
        CheckpointError: Not UTF-8, not JSON, not an object, or a key occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{where}: the key {twice!r} occurs twice; copy the file again")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}; copy the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_header_text(length: bytes, file: Any, file_bytes: int, path: Path) -> bytes:
    if len(length) < 8:
        raise CheckpointError(
            f"{path}: {file_bytes} bytes are no safetensors file; download it again"
        )
    (header_bytes,) = struct.unpack("<Q", length)
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: its header claims {header_bytes} bytes, expected at most "
            f"{MAX_HEADER_BYTES}; this is no safetensors file, or it is damaged"
        )
    if 8 + header_bytes > file_bytes:
        raise CheckpointError(
            f"{path}: truncated in its header: expected at least {8 + header_bytes} bytes, "
            f"got {file_bytes}; download it again"
        )
    return file.read(header_bytes)


def _read_entry(path: Path, name: str, raw: Any, base: int) -> TensorEntry:
    where = f"{path}: {name}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {raw!r}")
    dtype, shape, span = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: expected a shape of whole numbers, got {shape!r}")
    if not _are_sizes(span) or len(span) != 2:
        raise CheckpointError(f"{where}: expected two data_offsets, got {span!r}")
    spec = TensorSpec(tuple(shape), dtype)
    if span[1] - span[0] != spec.nbytes:
        raise CheckpointError(
            f"{where}: {spec} takes {spec.nbytes} bytes, its data_offsets {span} give "
            f"{span[1] - span[0]}; the header is damaged"
        )
    return TensorEntry(path, spec, base + span[0], base + span[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_spans(
    entries: Mapping[str, TensorEntry], path: Path, base: int, file_bytes: int
) -> None:
    """The spans, in order, must tile the file from the end of the header to its last byte."""
    position = base
    for name, entry in entries.items():
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "follows a gap"
            raise CheckpointError(f"{path}: {name}: {fault}; the header is damaged")
        position = entry.end
    if position > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: expected {position} bytes, got {file_bytes}; download it again"
        )
    if position < file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - position} bytes after the last tensor; the file is damaged"
        )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a weight_map of tensor names to file names")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and not {*file} & {*"/\\\0"}
        if not plain:
            raise CheckpointError(
                f"{path}: {name}: expected the name of a file in this folder, got {file!r}"
            )
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path}: lists {file}, which is missing; download it again")
    return weight_map


def _single_file(folder: Path) -> Path:
    """The one weights file of a folder without an index."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files but no {INDEX}; download it too"
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle file, which can run code and is never read; "
            "expected safetensors"
        )
    raise CheckpointError(f"{folder}: no safetensors files; this folder holds no checkpoint")
