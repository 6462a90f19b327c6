"""Writes one safetensors file from pieces, and takes its sha256 and that of each tensor on the way.

Reading, writing and the two hashes take about equal time, so each has a thread: whoever calls reads
the pieces, and three workers take them in order. All four release the interpreter while they work.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np

from mlx_gptoss.weight_files import TensorSpec, safetensors_header

Work = tuple[Callable[[memoryview], object], memoryview]
QUEUED_PIECES = 3  # bounds the memory: pieces that wait for the slowest worker


@dataclass(frozen=True)
class WrittenFile:
    """What is known of a finished file: its size and sha256, and the sha256 of each tensor."""

    nbytes: int
    sha256: str
    tensors: dict[str, str]


class _Worker:
    """A thread that does what it is told, in order, and stops working at the first error."""

    def __init__(self) -> None:
        self._queue: Queue[Work | None] = Queue(QUEUED_PIECES)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def do(self, function: Callable[[memoryview], object], data: memoryview) -> None:
        """Have `function(data)` called; an error of an earlier call is raised here."""
        if self._error is not None:
            raise self._error
        self._queue.put((function, data))

    def finish(self) -> None:
        """Wait for all of it."""
        self.stop()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread, whatever happened."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None:
                try:
                    work[0](work[1])
                except BaseException as error:
                    self._error = error


def write_file(
    path: Path,
    tensors: Mapping[str, TensorSpec],
    pieces: Callable[[str], Iterable[np.ndarray]],
    *,
    written: Callable[[int], None],
) -> WrittenFile:
    """Write a file under another name; `settle_file` makes it durable and gives it its own.

    Args:
        path: Its name in the end; `path` + `.part` is written.
        tensors: Names and specs, in the order of the file.
        pieces: Yields the bytes of a tensor, in order.
        written: Told the number of bytes after each piece.

    Raises:
        OSError: The disk is full, or fails.
    """
    whole, each = hashlib.sha256(), {name: hashlib.sha256() for name in tensors}
    nbytes = 0
    with _part(path).open("wb", buffering=0) as file:
        workers = write_all, hash_file, hash_tensor = _Worker(), _Worker(), _Worker()

        def write(data: memoryview) -> None:
            _write(file.fileno(), data)

        try:
            for name, data in _file_pieces(tensors, pieces):
                write_all.do(write, data)
                hash_file.do(whole.update, data)
                if name is not None:
                    hash_tensor.do(each[name].update, data)
                    written(len(data))
                nbytes += len(data)
            for worker in workers:
                worker.finish()
        finally:
            for worker in workers:
                worker.stop()
    digests = {name: digest.hexdigest() for name, digest in each.items()}
    return WrittenFile(nbytes, whole.hexdigest(), digests)


def settle_file(path: Path) -> None:
    """Make a written file durable, and only then give it its name.

    Raises:
        OSError: The disk is full, or fails.
    """
    with _part(path).open("rb") as file:
        os.fsync(file.fileno())
    os.replace(_part(path), path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _file_pieces(
    tensors: Mapping[str, TensorSpec], pieces: Callable[[str], Iterable[np.ndarray]]
) -> Iterable[tuple[str | None, memoryview]]:
    """The header, whose name is None, and then the pieces of every tensor."""
    yield None, memoryview(safetensors_header(tensors))
    for name, spec in tensors.items():
        size = 0
        for piece in pieces(name):
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            size += len(data)
            yield name, data
        assert size == spec.nbytes, f"{name}: {size} bytes, {spec} takes {spec.nbytes}"


def _write(descriptor: int, data: memoryview) -> None:
    """Write all of it: a single call may write less, for example when the disk fills up."""
    while data:
        data = data[os.write(descriptor, data) :]
