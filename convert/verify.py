"""Proof that a converted folder holds the source's weights: re-reads both and compares.

It goes the other way than the conversion: every tensor of the source is put together again from
the converted ones that it was cut into, and compared byte for byte. Where the options asked for
rounding (q8, q4, dense experts to MXFP4), the converted values are decoded and each is compared
with the bound that is published here.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_gptoss.checkpoint import Quantization
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.convert.names import Part, by_source
from mlx_gptoss.convert.reading import PIECE_BYTES, QUANTIZED_ROWS, SourceReader, read_experts
from mlx_gptoss.convert.sources import Source
from mlx_gptoss.errors import VerificationError
from mlx_gptoss.weight_files import ITEM_BYTES, TensorEntry

AFFINE_BOUND_STEPS = 0.5001  # half a step, and the float32 arithmetic that chose the code
MXFP4_BOUND_OF_PEAK = 0.25  # a quarter of the largest magnitude of the block of 32
SMALLEST_MXFP4_ERROR = 2.0**-129  # a quarter of the smallest step, where that is more


@dataclass(frozen=True)
class KindError:
    """The largest error of a kind of tensors, as it is and in the unit of its bound."""

    kind: str
    max_error: float
    relative_error: float
    bound: float
    unit: str


def verify_conversion(
    source: Source,
    tensors: Mapping[str, TensorEntry],
    quantization: Mapping[str, Quantization],
    *,
    compared: Callable[[int], None],
) -> list[KindError]:
    """Compare every tensor of the source with the converted ones.

    Args:
        source: What was converted.
        tensors: Where the converted tensors lie.
        quantization: How the converted modules are packed.
        compared: Told the number of bytes of the source after each piece.

    Returns:
        The largest error of each kind of tensors.

    Raises:
        VerificationError: A byte differs, or a rounded value is off by more than its bound.
        CheckpointError: A file cannot be read.
    """
    for path in {entry.path for entry in tensors.values()}:
        _forget_cached(path)
    worst: dict[tuple[str, str], KindError] = {}
    with SourceReader() as reader:
        check = _Comparison(source, tensors, quantization, reader)
        for name, parts in by_source(dict(source.parts)).items():
            if name not in source.tensors:
                continue  # the scales that a dense fine-tune does not have
            for error, nbytes in check.tensor(name, parts):
                key = (error.kind, error.unit)
                worst[key] = max(worst.get(key, error), error, key=lambda e: e.relative_error)
                compared(nbytes)
    return list(worst.values())


class _Comparison:
    """Compares tensors of one source with their converted parts."""

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, TensorEntry],
        quantization: Mapping[str, Quantization],
        reader: SourceReader,
    ) -> None:
        self.source, self.tensors, self.quantization = source, tensors, quantization
        self.reader = reader

    def tensor(self, name: str, parts: Mapping[str, Part]) -> Iterator[tuple[KindError, int]]:
        """The error of each piece of one source tensor, and the bytes compared; a fault raises."""
        packing = [self._packing(converted) for converted in parts]
        if packing[0] is None:
            yield from self._bytes(name, parts)
        elif packing[0].mode == "affine":
            for converted, part in parts.items():
                yield from self._affine(name, converted, part, packing[0].bits)
        else:
            yield from self._dense_experts(name, parts)

    def _packing(self, converted: str) -> Quantization | None:
        """How the values of a tensor were rounded; None where its bytes were only moved."""
        module, _, kind = converted.rpartition(".")
        packing = self.quantization.get(module) if kind == "weight" else None
        repacked = packing is not None and packing.mode == "mxfp4"
        return None if repacked and not self.source.dense_experts else packing

    def _bytes(self, name: str, parts: Mapping[str, Part]) -> Iterator[tuple[KindError, int]]:
        entry = self.source.tensors[name]
        axis = next(iter(parts.values())).axis
        outer, count = math.prod(entry.shape[:axis]), entry.shape[axis]
        row_bytes = entry.spec.nbytes // (outer * count)
        batch = max(2, PIECE_BYTES // row_bytes // 2 * 2)
        kind = KindError(_kind(next(iter(parts))), 0.0, 0.0, 0.0, "byte for byte")
        for index in range(outer):
            for first in range(0, count, batch):
                rows = range(first, min(first + batch, count))
                start = entry.start + (index * count + first) * row_bytes
                expected = self.reader.read(entry.path, start, len(rows) * row_bytes)
                got = self._rebuilt(parts, index, rows, count, row_bytes)
                if not np.array_equal(expected, got.reshape(-1)):
                    raise _fault(name, rows)
                yield kind, len(expected)

    def _rebuilt(
        self, parts: Mapping[str, Part], index: int, rows: range, count: int, row_bytes: int
    ) -> np.ndarray:
        """These rows of the source, put together from the converted tensors."""
        rebuilt = np.zeros((len(rows), row_bytes), np.uint8)
        for converted, part in parts.items():
            mine = range(count)[part.rows]  # the source's rows that this tensor holds
            begin = max(mine.start, rows.start + (mine.start - rows.start) % mine.step)
            wanted = range(begin, min(mine.stop, rows.stop), mine.step)
            if not wanted:
                continue
            entry = self.tensors[converted]
            position = index * len(mine) + mine.index(wanted[0])
            data = self.reader.read(
                entry.path, entry.start + position * row_bytes, len(wanted) * row_bytes
            )
            low = wanted.start - rows.start
            rebuilt[low : wanted.stop - rows.start : mine.step] = data.reshape(-1, row_bytes)
        return rebuilt

    def _affine(
        self, name: str, converted: str, part: Part, bits: int
    ) -> Iterator[tuple[KindError, int]]:
        entry, module = self.source.tensors[name], converted.removesuffix(".weight")
        columns = entry.shape[1]
        mine = range(entry.shape[0])[part.rows]
        for first in range(0, len(mine), QUANTIZED_ROWS):
            rows = range(first, min(first + QUANTIZED_ROWS, len(mine)))
            source_rows = range(mine[rows[0]], mine[rows[-1]] + 1)
            wanted = affine.f32(self._rows(entry, source_rows).view(np.uint16))
            packed, scales, biases = (
                self._rows(self.tensors[f"{module}.{kind}"], rows)
                for kind in ("weight", "scales", "biases")
            )
            steps = affine.f32(scales.view(np.uint16))
            got = affine.decode(
                packed.view(np.uint32), scales.view(np.uint16), biases.view(np.uint16), bits=bits
            )
            error = np.abs(got - wanted).reshape(*steps.shape, -1).max(-1)
            relative = _ratio(error, steps)
            kind = KindError(
                _kind(converted), float(error.max()), relative, AFFINE_BOUND_STEPS, "steps"
            )
            yield _within_bound(kind, name, source_rows), len(rows) * columns * 2

    def _dense_experts(
        self, name: str, parts: Mapping[str, Part]
    ) -> Iterator[tuple[KindError, int]]:
        entry = self.source.tensors[name]
        count = entry.shape[2]
        for expert, matrix in enumerate(read_experts(self.reader, entry)):
            for converted, part in parts.items():
                mine = range(count)[part.rows]
                for first in range(0, len(mine), QUANTIZED_ROWS):
                    rows = range(first, min(first + QUANTIZED_ROWS, len(mine)))
                    picked = matrix[:, mine[rows[0]] : mine[rows[-1]] + 1 : mine.step]
                    kind = self._mxfp4_error(converted, expert * len(mine), rows, picked.T)
                    yield _within_bound(kind, name, rows), picked.size * 2

    def _mxfp4_error(
        self, converted: str, offset: int, rows: range, values: np.ndarray
    ) -> KindError:
        rows = range(offset + rows.start, offset + rows.stop)
        wanted = affine.f32(np.ascontiguousarray(values))  # (rows, columns)
        groups = (len(rows), wanted.shape[1] // mxfp4.BLOCK)
        module = converted.removesuffix(".weight")
        blocks = self._rows(self.tensors[converted], rows).reshape(*groups, -1)
        scales = self._rows(self.tensors[f"{module}.scales"], rows).reshape(groups)
        error = np.abs(mxfp4.decode(blocks, scales) - wanted).reshape(*groups, -1).max(-1)
        peak = np.abs(wanted).reshape(*groups, -1).max(-1)
        peak = np.maximum(peak, SMALLEST_MXFP4_ERROR / MXFP4_BOUND_OF_PEAK)
        return KindError(
            _kind(converted),
            float(error.max()),
            _ratio(error, peak),
            MXFP4_BOUND_OF_PEAK,
            "of the block's largest weight",
        )

    def _rows(self, entry: TensorEntry, rows: range) -> np.ndarray:
        """Rows of a tensor, all dimensions but the last counted as rows, as (rows, bytes)."""
        row_bytes = entry.shape[-1] * ITEM_BYTES[entry.dtype]
        start = entry.start + rows.start * row_bytes
        return self.reader.read(entry.path, start, len(rows) * row_bytes).reshape(len(rows), -1)


def _ratio(error: np.ndarray, unit: np.ndarray) -> float:
    """The largest error in its unit; infinite where an error meets a unit of zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(error == 0, 0, error / unit).max())


def _within_bound(error: KindError, name: str, rows: range) -> KindError:
    """The same error, if it keeps its bound; not a number keeps none."""
    if error.relative_error <= error.bound:
        return error
    raise _fault(name, rows)


def _fault(name: str, rows: range) -> VerificationError:
    return VerificationError(
        f"{name}: rows {rows.start} to {rows.stop - 1} differ from the source; convert again, and "
        "check the disk"
    )


def _kind(converted: str) -> str:
    for part, kind in (
        (".bias", "biases, norms, sinks, router"),
        (".experts.", "experts"),
        ("_proj.", "attention"),
        ("embed_tokens", "embedding"),
        ("lm_head", "unembedding"),
    ):
        if part in converted:
            return kind
    return "biases, norms, sinks, router"


def _forget_cached(path: Path) -> None:
    """Have the next reads come from the disk, where the system offers it (Linux)."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
