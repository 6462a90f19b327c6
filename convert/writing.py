"""Writes one safetensors file from pieces, and takes its sha256 and that of each tensor on the way.

Hashing costs about as much as copying, so it runs beside the copying: one thread takes the hash of
the file, another those of the tensors (`hashlib` releases the interpreter for large buffers).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np

from mlx_gptoss.weight_files import TensorSpec, safetensors_header

_END = b""
QUEUED_PIECES = 3  # bounds the memory: pieces that wait to be hashed


@dataclass(frozen=True)
class WrittenFile:
    """What is known of a finished file: its size and sha256, and the sha256 of each tensor."""

    nbytes: int
    sha256: str
    tensors: dict[str, str]


class _Hasher:
    """A thread that hashes what it is given, in order."""

    def __init__(self) -> None:
        self._queue: Queue[bytes | memoryview | None] = Queue(QUEUED_PIECES)
        self._hash = hashlib.sha256()
        self._digests: list[str] = []
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, data: bytes | memoryview) -> None:
        self._queue.put(data)

    def cut(self) -> None:
        """End one hash and begin the next."""
        self._queue.put(None)

    def digests(self) -> list[str]:
        """All hashes; the last `cut` ends the last one."""
        self._queue.put(_END)
        self._thread.join()
        return self._digests

    def _run(self) -> None:
        while True:
            data = self._queue.get()
            if data is None:
                self._digests.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()
            elif data is _END:
                return
            else:
                self._hash.update(data)


@contextmanager
def _hashers(count: int) -> Iterator[list[_Hasher]]:
    """Hashers whose threads end with the block, also when it fails."""
    hashers = [_Hasher() for _ in range(count)]
    try:
        yield hashers
    finally:
        for hasher in hashers:
            hasher.digests()


def write_file(
    path: Path,
    tensors: Mapping[str, TensorSpec],
    pieces: Callable[[str], Iterable[np.ndarray]],
    *,
    written: Callable[[int], None],
) -> WrittenFile:
    """Write a file under another name, make it durable, and then give it its own name.

    Args:
        path: Appears only when complete; until then `path` + `.part` is written.
        tensors: Names and specs, in the order of the file.
        pieces: Yields the bytes of a tensor, in order.
        written: Told the number of bytes after each piece.

    Raises:
        OSError: The disk is full, or fails.
    """
    part = path.with_name(path.name + ".part")
    header = safetensors_header(tensors)
    with part.open("wb", buffering=0) as file, _hashers(2) as (whole, each):
        _write(file.fileno(), header)
        whole.update(header)
        for name, spec in tensors.items():
            size = 0
            for piece in pieces(name):
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                whole.update(data)
                each.update(data)
                _write(file.fileno(), data)
                written(len(data))
                size += len(data)
            assert size == spec.nbytes, f"{name}: {size} bytes written, {spec} takes {spec.nbytes}"
            each.cut()
        whole.cut()
        digests = each.digests()
        (sha256,) = whole.digests()
        os.fsync(file.fileno())
    os.replace(part, path)
    nbytes = len(header) + sum(spec.nbytes for spec in tensors.values())
    return WrittenFile(nbytes, sha256, dict(zip(tensors, digests, strict=True)))


def _write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it: a single call may write less, for example when the disk fills up."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
