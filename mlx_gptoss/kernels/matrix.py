"""How a weight matrix enters a kernel: its arrays, its Metal type, and what it must look like."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, expect, require
from mlx_gptoss.matrix import Matrix

AFFINE_GROUP = 64
MXFP4_BLOCK = 32
MOST_SIMDGROUPS = 12  # of a threadgroup: with 128 registers a thread they fill a core's 208 KB
MOST_BLOCKS = 8  # of two rows in a threadgroup: as many rows as an engine has turns


def simdgroups(columns: int) -> int:
    """Simdgroups that share the columns of a row, 32 columns a lane (`Split` in matvec.h)."""
    return -(-(columns // 32) // 32)


@dataclass(frozen=True)
class RowBlocks:
    """How the rows of a batch are cut for a dense kernel.

    Attributes:
        each: R, rows that a simdgroup multiplies by each weight it reads.
        blocks: such blocks in a threadgroup, whose simdgroups read the same weights.
        parts: parts of the columns that a simdgroup takes one after the other.
        tiles: times as many rows of weights in a threadgroup as alone.
        groups: threadgroups that share the batch.
        simdgroups: of a threadgroup.
        batch: the Metal expression of B, read where a threadgroup has more than one row.
    """

    each: int
    blocks: int
    parts: int
    tiles: int
    groups: int
    simdgroups: int
    batch: str

    @property
    def vectors(self) -> int:
        """Rows of a threadgroup."""
        return self.each * self.blocks

    @property
    def template(self) -> str:
        """Arguments R, BLOCKS, PARTS of a kernel."""
        return f"{self.each}, {self.blocks}, {self.parts}"


def row_blocks(batch: int, columns: int) -> RowBlocks:
    """Cut a batch into blocks of two rows, and the blocks evenly into threadgroups.

    All of a threadgroup's blocks read a weight together, so a batch of 16 reads it once: where a
    simdgroup for each part of the columns would be too many, each takes several parts.
    """
    parts = simdgroups(columns)
    if batch == 1:
        return RowBlocks(each=1, blocks=1, parts=1, tiles=1, groups=1, simdgroups=parts, batch="1")
    pairs = -(-batch // 2)
    groups = -(-pairs // MOST_BLOCKS)
    blocks = -(-pairs // groups)
    fit = [n for n in range(1, parts + 1) if parts % n == 0 and n * blocks <= MOST_SIMDGROUPS]
    ways = max(fit, default=1)
    return RowBlocks(
        each=2,
        blocks=blocks,
        parts=parts // ways,
        tiles=2 if blocks > 1 else 1,
        groups=groups,
        simdgroups=ways * blocks,
        batch="x_shape[0]",
    )


def require_columns(stem: str, name: str, columns: int) -> None:
    """Columns must fill lanes of 32 values, evenly spread over the simdgroups."""
    good = columns % 32 == 0 and columns // 32 % simdgroups(columns) == 0
    require(stem, good, name, "a multiple of 32 that fills whole simdgroups", columns)


class DenseMatrix:
    """A plain or affine (rows, columns) matrix as a kernel sees it.

    Attributes:
        inputs: the arrays, under names that begin with the matrix's.
        value: the Metal expression that makes the matrix from them.
    """

    def __init__(self, stem: str, name: str, matrix: Matrix, *, rows: int, columns: int) -> None:
        require_columns(stem, f"{name} columns", columns)
        self.inputs = {f"{name}_w": matrix.weight}
        if matrix.mode is None:
            expect(stem, name, matrix.weight, (rows, columns), *FLOATS)
            kind = f"Plain<{FLOATS[matrix.weight.dtype]}, {columns}>"
        else:
            require(stem, matrix.mode == "affine", name, "plain or affine weights", matrix.mode)
            require(stem, matrix.bits in (4, 8), f"{name} bits", "4 or 8", matrix.bits)
            require(
                stem, columns % AFFINE_GROUP == 0, f"{name} columns", "whole groups of 64", columns
            )
            assert matrix.bits is not None
            assert matrix.scales is not None
            assert matrix.offsets is not None
            expect(stem, name, matrix.weight, (rows, columns * matrix.bits // 32), mx.uint32)
            scales = (rows, columns // AFFINE_GROUP)
            expect(stem, f"{name} scales", matrix.scales, scales, *FLOATS)
            expect(stem, f"{name} offsets", matrix.offsets, scales, matrix.scales.dtype)
            self.inputs |= {f"{name}_s": matrix.scales, f"{name}_o": matrix.offsets}
            kind = f"Affine<{FLOATS[matrix.scales.dtype]}, {matrix.bits}, {columns}>"
        self.value = f"{kind}{{{', '.join(self.inputs)}}}"


def expert_inputs(
    stem: str, name: str, matrix: Matrix, shape: Sequence[int]
) -> dict[str, mx.array]:
    """The arrays of an MXFP4 (E, rows, columns) matrix with bias, checked, under `name_*`."""
    experts, rows, columns = shape
    require_columns(stem, f"{name} columns", columns)
    require(stem, rows % 16 == 0, f"{name} rows", "a multiple of 16", rows)
    require(stem, matrix.mode == "mxfp4", name, "mxfp4 weights", matrix.mode)
    assert matrix.scales is not None
    assert matrix.bias is not None
    expect(stem, name, matrix.weight, (experts, rows, columns // 8), mx.uint32)
    expect(stem, f"{name} scales", matrix.scales, (experts, rows, columns // MXFP4_BLOCK), mx.uint8)
    expect(stem, f"{name} bias", matrix.bias, (experts, rows), *FLOATS)
    return {f"{name}_w": matrix.weight, f"{name}_s": matrix.scales, f"{name}_b": matrix.bias}


def gate_and_up(stem: str, x: mx.array, gate: Matrix, up: Matrix) -> dict[str, mx.array]:
    """The arrays of gate and up (E, H, D), checked, as is x (B, D), which they multiply."""
    batch, width = x.shape
    expect(stem, "x", x, (batch, width), *FLOATS)
    shape = (*gate.weight.shape[:2], width)
    return expert_inputs(stem, "gate", gate, shape) | expert_inputs(stem, "up", up, shape)
