"""The bytes of every converted tensor, cut out of the source in pieces of bounded size.

Nothing here holds a tensor: a piece is at most 8 MiB of source (one expert's matrix for a dense
fine-tune), so the peak memory of a conversion does not depend on the checkpoint. Expert blocks and
bfloat16 tensors pass as bytes. NaN and infinite weights and the scale byte 255 stop a conversion.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mlx_gptoss.checkpoint import Quantization
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.convert.names import Part
from mlx_gptoss.convert.sources import Source
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weight_files import ITEM_BYTES, TensorEntry

PIECE_BYTES = 8 << 20
QUANTIZED_ROWS = 256  # rows quantised at a time: 3 MB of float32 at the published width


class SourceReader:
    """Reads pieces of the source's files by position; a context manager that closes them."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "SourceReader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, path: Path, start: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes at `start`, as uint8.

        Raises:
            CheckpointError: The file cannot be read, or has become shorter since it was checked.
        """
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[path], nbytes, start)
            while len(data) < nbytes and (more := self._more(path, start, nbytes, data)):
                data += more
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        if len(data) < nbytes:
            raise CheckpointError(
                f"{path}: expected {nbytes} bytes at {start}, got {len(data)}; the file has "
                "changed since the conversion began"
            )
        return np.frombuffer(data, np.uint8)

    def _more(self, path: Path, start: int, nbytes: int, data: bytes) -> bytes:
        return os.pread(self._files[path], nbytes - len(data), start + len(data))


def read_rows(
    reader: SourceReader, entry: TensorEntry, *, axis: int, rows: slice
) -> Iterator[np.ndarray]:
    """The chosen rows along an axis, for every index of the axes before it, as pieces of bytes.

    Yields:
        Contiguous uint8 arrays `(rows, bytes of a row)`, in order.
    """
    outer, count = math.prod(entry.shape[:axis]), entry.shape[axis]
    row_bytes = entry.spec.nbytes // max(1, outer * count)
    start, stop, step = rows.indices(count)
    if start < step:  # every step-th row: read whole steps, and keep one row of each
        start, kept = 0, start
    else:
        kept = 0
    batch = max(step, PIECE_BYTES // max(1, row_bytes) // step * step)
    if step == 1 and stop - start == count:  # whole: the outer indexes follow each other
        outer, stop = 1, outer * count
    for index in range(outer):
        for first in range(start, stop, batch):
            last = min(first + batch, stop)
            position = entry.start + (index * count + first) * row_bytes
            data = reader.read(entry.path, position, (last - first) * row_bytes)
            yield np.ascontiguousarray(data.reshape(last - first, row_bytes)[kept::step])


class Cutter:
    """Cuts converted tensors out of a source, packing what the options ask for."""

    def __init__(
        self, source: Source, quantization: Mapping[str, Quantization], reader: SourceReader
    ) -> None:
        self.source, self.quantization, self.reader = source, quantization, reader
        self._held: dict[str, np.ndarray] = {}

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of one converted tensor, in order.

        A packed weight must be cut before its scales and biases: they come from the same pass over
        the source, and are held until they are asked for.

        Raises:
            CheckpointError: A weight is NaN or infinite, a scale byte is 255, or a file changed.
        """
        if name in self._held:
            yield self._held.pop(name)
            return
        module, _, kind = name.rpartition(".")
        packing = self.quantization.get(module)
        part = self.source.parts[name]
        if kind == "weight" and packing is not None and packing.mode == "affine":
            yield from self._affine(module, part, packing.bits)
        elif kind == "weight" and packing is not None and self.source.dense_experts:
            yield from self._mxfp4(module, part)
        else:
            yield from self._unchanged(name, part)

    def _unchanged(self, name: str, part: Part) -> Iterator[np.ndarray]:
        entry = self.source.tensors[part.source]
        for piece in read_rows(self.reader, entry, axis=part.axis, rows=part.rows):
            if entry.dtype == "BF16":
                check_finite(piece.view(np.uint16), entry, part.source)
            elif name.endswith(".scales"):
                check_scales(piece, entry, part.source)
            yield piece

    def _affine(self, module: str, part: Part, bits: int) -> Iterator[np.ndarray]:
        entry = self.source.tensors[part.source]
        scales, biases = [], []
        for piece in read_rows(self.reader, entry, axis=part.axis, rows=part.rows):
            values = piece.view(np.uint16)  # (rows, columns)
            check_finite(values, entry, part.source)
            for first in range(0, len(values), QUANTIZED_ROWS):
                weight = affine.f32(values[first : first + QUANTIZED_ROWS])
                packed, scale, bias = affine.quantize(weight, bits)
                scales.append(scale)
                biases.append(bias)
                yield packed
        self._held[f"{module}.scales"] = np.concatenate(scales)
        self._held[f"{module}.biases"] = np.concatenate(biases)

    def _mxfp4(self, module: str, part: Part) -> Iterator[np.ndarray]:
        entry = self.source.tensors[part.source]
        scales = []
        for matrix in read_experts(self.reader, entry):
            check_finite(matrix, entry, part.source)
            columns = matrix[:, part.rows]  # (in, rows): the converted rows are its columns
            for first in range(0, columns.shape[1], QUANTIZED_ROWS):
                rows = np.ascontiguousarray(columns[:, first : first + QUANTIZED_ROWS].T)
                blocks, scale = mxfp4.quantize(affine.f32(rows))
                scales.append(scale)
                yield blocks
        self._held[f"{module}.scales"] = np.concatenate(scales)


def read_experts(reader: SourceReader, entry: TensorEntry) -> Iterator[np.ndarray]:
    """The matrices of a dense expert tensor, one expert at a time: (in, out) uint16."""
    experts, columns, rows = entry.shape
    nbytes = columns * rows * ITEM_BYTES["BF16"]
    for expert in range(experts):
        data = reader.read(entry.path, entry.start + expert * nbytes, nbytes)
        yield data.view(np.uint16).reshape(columns, rows)


def check_finite(values: np.ndarray, entry: TensorEntry, name: str) -> None:
    """Refuse bfloat16 bit patterns (uint16) whose exponent is all ones."""
    exponent = np.bitwise_and(values, 0x7F80)
    if exponent.size and exponent.max() == 0x7F80:
        raise CheckpointError(
            f"{entry.path}: {name}: a weight is NaN or infinite; the checkpoint is damaged"
        )


def check_scales(scales: np.ndarray, entry: TensorEntry, name: str) -> None:
    """Refuse the scale byte that means "not a number"."""
    if scales.size and scales.max() == mxfp4.NAN_SCALE:
        raise CheckpointError(
            f"{entry.path}: {name}: a scale byte is 255, which is NaN in MXFP4, expected at most "
            "254; the checkpoint is damaged"
        )
