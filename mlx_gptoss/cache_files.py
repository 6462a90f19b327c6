"""Keys and values of one conversation in a file, for another process to go on from.

A safetensors file, with N tokens fed and saved positions p:

    tokens                       (N,) I32
    positions                    (P,) I32, ascending: where the conversation can go back to
    full.L.keys, full.L.values   (1, Hkv, N, Dh) of each full layer L
    ring.p.L.keys, .values       (1, Hkv, W, Dh) of each sliding layer at each position, and at N

Its name is the identity of the model that computed it and the hash of all its bytes. So a file is
never changed, what a crash or a bad disk left of one is recognised, and two processes that write
the same thing write the same file. It appears by a rename; until then its writer holds a lock on
it, by which others know what a killed process left behind. It is not synced: after a power cut the
hash says what is whole.

What is read before it is needed is the header, the tokens and the positions.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import (
    FullSnapshot,
    ModelCache,
    ModelSnapshot,
    Segment,
    WindowCache,
    WindowSnapshot,
)
from mlx_gptoss.errors import CacheError
from mlx_gptoss.harmony.ledger import TokenLedger
from mlx_gptoss.weight_files import (
    TensorEntry,
    TensorSpec,
    read_safetensors_header,
    safetensors_header,
)

NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{32})\.safetensors")
PART = re.compile(r"\.mlx-gptoss-[0-9a-f]{32}\.part")  # of a file that is being written
DTYPES = {"BF16": mx.bfloat16, "F32": mx.float32}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
KINDS = ("keys", "values")

Layers = Sequence[WindowSnapshot | FullSnapshot]
Windows = tuple[WindowSnapshot, ...]  # the sliding layers alone
# (1, Hkv, rows, bytes of a row), and of what type they are
Rows = tuple[npt.NDArray[np.uint8], mx.Dtype]


@dataclass(frozen=True)
class Content:
    """What a file is written from; its arrays are evaluated and may be read in any thread.

    Attributes:
        tokens: What the cache was fed.
        positions: Where it can go back to.
        arrays: By name: the spec of a tensor and its bytes, (1, Hkv, rows, bytes of a row).
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    arrays: Mapping[str, tuple[TensorSpec, mx.array]]

    @classmethod
    def of(cls, tokens: Sequence[int], layers: Layers, windows: Mapping[int, Windows]) -> "Content":
        """Take hold of arrays; copies nothing.

        Args:
            tokens: What the cache was fed.
            layers: Its snapshot; full layers have nothing in their short store.
            windows: The sliding layers at saved positions.
        """
        arrays: dict[str, tuple[TensorSpec, mx.array]] = {}

        def add(stem: str, segment: Segment, rows: int) -> None:
            for kind, array in zip(KINDS, segment, strict=True):
                batch, heads, _, width = array.shape
                spec = TensorSpec((batch, heads, rows, width), SPELLED[array.dtype])
                arrays[f"{stem}.{kind}"] = spec, array.view(mx.uint8)[:, :, :rows]

        end = {n: layer for n, layer in enumerate(layers) if isinstance(layer, WindowSnapshot)}
        for n, layer in enumerate(layers):
            if isinstance(layer, FullSnapshot):
                assert not layer.recent_length
                add(f"full.{n}", layer.frozen, layer.frozen_length)
        for position, rings in {**windows, len(tokens): tuple(end.values())}.items():
            for n, ring in zip(end, rings, strict=True):
                add(f"ring.{position}.{n}", (ring.keys, ring.values), ring.keys.shape[2])
        mx.eval([array for _, array in arrays.values()])
        return cls(tuple(tokens), tuple(sorted(windows)), arrays)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What the file's tensors are, in their order."""
        return {
            "tokens": TensorSpec((len(self.tokens),), "I32"),
            "positions": TensorSpec((len(self.positions),), "I32"),
            **{name: spec for name, (spec, _) in self.arrays.items()},
        }

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        specs = self.specs
        return len(safetensors_header(specs)) + sum(spec.nbytes for spec in specs.values())

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of the file, in contiguous pieces."""
        yield memoryview(safetensors_header(self.specs))
        yield np.array(self.tokens, "<i4").data
        yield np.array(self.positions, "<i4").data
        for _, array in self.arrays.values():
            for head in np.asarray(array)[0]:
                yield np.ascontiguousarray(head).data


@dataclass(frozen=True)
class Entry:
    """A file, as far as it was read; nothing of it is proven before `read_state`.

    Attributes:
        path: Where it is.
        ledger: Its tokens and positions.
        tensors: Its header.
    """

    path: Path
    ledger: TokenLedger[None]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def read(cls, path: Path) -> "Entry":
        """Read the header, the tokens and the positions.

        Raises:
            CheckpointError: It is no safetensors file, is damaged or cannot be read.
            CacheError: It is another safetensors file.
        """
        tensors = read_safetensors_header(path)
        integers = {name for name, entry in tensors.items() if entry.dtype == "I32"}
        if integers != {"tokens", "positions"}:
            raise CacheError(f"{path}: expected a cache of tokens, got tensors {list(tensors)[:4]}")
        with path.open("rb") as file:
            tokens, positions = (
                np.frombuffer(_bytes(file, tensors[name]), "<i4").tolist()
                for name in ("tokens", "positions")
            )
        ledger = TokenLedger[None]()
        for position in positions:
            ledger.feed(tokens[len(ledger.tokens) : position])
            ledger.save(None)
        ledger.feed(tokens[len(ledger.tokens) :])
        return cls(path, ledger, tensors)

    def read_state(self, length: int, *, sliding: Sequence[bool]) -> "SavedState":
        """Read the file up to its end or a saved position, once all of it is proven; in any thread.

        Args:
            length: The position.
            sliding: Which layers of the model are.

        Raises:
            CacheError: The file is damaged, or is another model's.
            OSError: It cannot be read.
        """
        positions = [position for position in self.ledger.positions if position <= length]
        wanted: dict[str, int | None] = {}  # stems, and how many of their rows
        for n, slides in enumerate(sliding):
            rings = {f"ring.{position}.{n}": None for position in (*positions, length)}
            wanted |= rings if slides else {f"full.{n}": length}
        with self.path.open("rb") as file:
            self._prove(file)
            segments = {stem: self._segment(file, stem, rows) for stem, rows in wanted.items()}
        return SavedState(length, tuple(positions), segments)

    def _segment(self, file: BufferedReader, stem: str, rows: int | None) -> list[Rows]:
        names = [f"{stem}.{kind}" for kind in KINDS]
        if missing := [name for name in names if name not in self.tensors]:
            raise CacheError(f"{self.path}: expected the tensors {', '.join(missing)}")
        return [_rows(file, self.tensors[name], rows) for name in names]

    def _prove(self, file: BufferedReader) -> None:
        expected = self.path.stem.partition("-")[2]
        found = hashlib.file_digest(file, "sha256").hexdigest()[: len(expected)]
        if found != expected:
            raise CacheError(f"{self.path}: damaged: expected hash {expected}, got {found}")


@dataclass(frozen=True)
class SavedState:
    """What was read of a file, in arrays of numpy's, which any thread may hold.

    Attributes:
        length: Of the conversation, in tokens.
        positions: Where it can go back to.
        segments: Keys and values by the stem of their names; `fill` empties it.
    """

    length: int
    positions: tuple[int, ...]
    segments: dict[str, list[Rows]]

    def fill(self, cache: ModelCache) -> dict[int, Windows]:
        """Bring an empty cache to this state; once, in the thread that owns the model.

        Args:
            cache: Of the model that computed the file.

        Returns:
            The sliding layers at the saved positions. All arrays are evaluated.
        """
        sliding = [n for n, layer in enumerate(cache) if isinstance(layer, WindowCache)]

        def segment(stem: str) -> Segment:
            keys, values = (mx.array(data).view(dtype) for data, dtype in self.segments.pop(stem))
            return keys, values

        windows = {
            p: tuple(WindowSnapshot(*segment(f"ring.{p}.{n}"), p) for n in sliding)
            for p in {*self.positions, self.length}
        }
        ends = iter(windows[self.length])
        layers = tuple(
            next(ends)
            if isinstance(layer, WindowCache)
            else FullSnapshot(segment(f"full.{n}"), layer.snapshot().recent, self.length, 0)
            for n, layer in enumerate(cache)
        )
        mx.eval(layers, windows)
        cache.restore(ModelSnapshot(layers, cache.left_padding))
        return {position: windows[position] for position in self.positions}


def write(folder: Path, identity: str, content: Content) -> Path:
    """Write a file that only its owner can read.

    Args:
        folder: Where.
        identity: Of the model that computed the content, 16 hex digits.
        content: What.

    Returns:
        Its path.

    Raises:
        OSError: The disk is full, or fails; nothing is left behind.
    """
    part, digest = folder / f".mlx-gptoss-{uuid.uuid4().hex}.part", hashlib.sha256()
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            for piece in content.pieces():
                digest.update(piece)
                file.write(piece)
            file.flush()
            path = folder / f"{identity}-{digest.hexdigest()[:32]}.safetensors"
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left unfinished."""
    for part in filter(lambda path: PART.fullmatch(path.name), folder.iterdir()):
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            part.unlink()


def _rows(file: BufferedReader, entry: TensorEntry, rows: int | None) -> Rows:
    """The first rows of a tensor, or all; holds no more than those."""
    data = np.frombuffer(_bytes(file, entry), np.uint8).reshape(*entry.shape[:3], -1)
    return np.ascontiguousarray(data[:, :, :rows]), DTYPES[entry.dtype]


def _bytes(file: BufferedReader, entry: TensorEntry) -> bytes:
    file.seek(entry.start)
    return file.read(entry.end - entry.start)
