"""An embedding table that stays in its file: each token's row is read when it is needed.

A decoded token needs one row of the table, a prompt one a token; the rest, 1.16 GB of the published
models, only takes room. The system keeps rows that were read lately as it keeps any file's.
The price: a token must have reached the host before the next step can begin.
"""

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint import Quantization, TensorEntry
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.matrix import Matrix, embed

MODULE = "model.embed_tokens"
EmbeddingPlace = Literal["memory", "file"]
PLACES: tuple[EmbeddingPlace, ...] = ("memory", "file")
NUMPY = {"BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}


class FileTable:
    """The rows of the embedding of one checkpoint; its file stays open.

    Args:
        tensors: of a checkpoint, by name.
        packing: of the table; None where it is dense.
        dtype: of the model: float32 widens what is bfloat16, as of every other weight.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(
        self, tensors: Mapping[str, TensorEntry], packing: Quantization | None, *, dtype: mx.Dtype
    ):
        self._packing, self._dtype = packing, dtype
        prefix = f"{MODULE}."
        self._parts = {n.removeprefix(prefix): e for n, e in tensors.items() if prefix in n}
        self._files: dict[Path, int] = {}
        for path in {entry.path for entry in self._parts.values()}:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
            weakref.finalize(self, os.close, self._files[path])

    def rows(self, tokens: mx.array) -> Matrix:
        """The rows of some tokens, as a matrix of their own; waits for the tokens.

        Args:
            tokens: integers of any shape, N in all.

        Returns:
            (N, D), packed as the table is.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        ids = np.array(tokens).reshape(-1)
        parts = {name: self._read(entry, ids) for name, entry in self._parts.items()}
        if (packing := self._packing) is None:
            return Matrix(weight=parts["weight"])
        return Matrix(
            weight=parts["weight"],
            scales=parts["scales"],
            offsets=parts.get("biases"),
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
        )

    def _read(self, entry: TensorEntry, ids: np.ndarray) -> mx.array:
        file, size = self._files[entry.path], (entry.end - entry.start) // entry.shape[0]
        found = b"".join(os.pread(file, size, entry.start + size * int(i)) for i in ids)
        if len(found) != size * len(ids):
            raise CheckpointError(
                f"{entry.path}: truncated since it was opened: expected {size} bytes of each of "
                f"{len(ids)} rows, got {len(found)} in all; convert the model again"
            )
        array = mx.array(np.frombuffer(found, NUMPY[entry.dtype]).reshape(len(ids), -1))
        return array.view(mx.bfloat16).astype(self._dtype) if entry.dtype == "BF16" else array


def rows_of(table: Matrix | FileTable, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    """Rows of the embedding, wherever it is: (B, T) -> (B, T, D) of `dtype`."""
    if isinstance(table, Matrix):
        return embed(tokens, table, dtype)
    return embed(mx.arange(tokens.size).reshape(tokens.shape), table.rows(tokens), dtype)
