"""On which sizes a kernel is tried before it runs a model: those that differ in what is compiled.

A model's widths, heads, experts and vocabulary are constants of the compiled kernels, and so are
the rows of an append segment and how a batch is cut. The lengths of caches and chunks are not, but
decide how a kernel's loops begin and end.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.inputs import Sizes

ROWS = 128  # of an append segment, as in decode_state.py
# One row alone, and each way in which rows fill threadgroups of a dense kernel (`row_blocks`).
BATCHES = (1, 2, 3, 5, 8, 9, 13, 16, 21)


def _rows(*counts: int) -> list[dict[str, Any]]:
    return [{"batch": count} for count in counts]


def _context(capacity: int, base: int, slot: int, *, batch: int = 1) -> dict[str, Any]:
    """A cache of so many rows, `base` of them filled, and a place in the append segment."""
    given = {"capacity": capacity, "base": base, "slot": slot, "splits": splits_for(capacity)}
    return given | {"batch": batch}


# What a model asks of a stem; of those not named here, `BATCHES`.
ASKED: dict[str, list[dict[str, Any]]] = {
    # the first token; one split; two; an odd tail in 32, the most there are
    "attention_decode": [
        _context(256, 0, 0), _context(256, 201, 127), _context(512, 480, 33, batch=2),
        _context(8192, 7935, 64),
    ],
    "attention_reduce": [{"splits": 1, "batch": 1}, {"splits": 2, "batch": 2},
                         {"splits": 32, "batch": 1}],
    # a ring that is empty, begun, full for the first time, and long gone round
    "attention_window": [
        _context(256, base, slot, batch=batch)
        for base, slot, batch in ((0, 0, 1), (40, 127, 1), (128, 0, 1), (1000, 77, 2))
    ],
    # a first chunk, one in the middle, an odd tail of two rows, one of them padded, and eight rows,
    # whose beginnings MLX passes otherwise than those of fewer
    "attention_window_prefill": [
        {"batch": batch, "base": base, "tokens": tokens}
        for batch, base, tokens in ((1, 0, 512), (1, 512, 256), (2, 110, 67), (8, 300, 33))
    ],
    "embed": _rows(1, 8),  # MLX passes fewer than 8 tokens otherwise than more
    "expert_dispatch": [{"tokens": 16}, {"tokens": 67}, {"tokens": 512}],
    "expert_groups": _rows(1, 2, 8, 32),
    # the rows of a batch are not in what is compiled
    "experts_down": _rows(1, 3),
    "experts_down_grouped": _rows(2, 8),
    "experts_sum": _rows(2, 8),
    "experts_swiglu": _rows(1, 3),
    "experts_swiglu_grouped": _rows(2, 8),
    # a first chunk, one that leaves some of the ring, and a long one of two rows
    "extend_ring": [
        {"batch": batch, "base": base, "tokens": tokens}
        for batch, base, tokens in ((1, 0, 512), (1, 333, 67), (2, 110, 512))
    ],
    "qkv_rope": [{"batch": 1, "tokens": 1}, {"batch": 2, "tokens": 67}],
    "rms_norm": [{"batch": 1, "tokens": 1}, {"batch": 2, "tokens": 67}],
    # one block of two rows, two, three, and threadgroups that are full
    "route_prefill": [{"tokens": 1}, {"tokens": 3}, {"tokens": 6}, {"tokens": 67}],
    "sample_filtered": _rows(1, 8),
    "sample_token": _rows(1, 8),
    "sum_pairs": [{"tokens": 16}, {"tokens": 67}],
    "swiglu_pairs": [{"tokens": 16}, {"tokens": 67}],
}  # fmt: skip

# Rows of the largest matrices that are tried where they are random: a second copy of a model's
# would not fit. They are multiplied one by one.
CUT = {
    "embed": {"vocab": 640},
    "experts_down": {"hidden": 64},
    "experts_down_grouped": {"hidden": 64},
    "experts_swiglu": {"inter": 64},
    "experts_swiglu_grouped": {"inter": 64},
    "unembed": {"vocab": 640},
}


def trials(stem: str, sizes: Sizes) -> Sequence[Sizes]:
    """The sizes on which a kernel is tried for a model whose weights are there.

    Args:
        stem: of the kernel.
        sizes: of the model.
    """
    return [replace(sizes, **asked) for asked in ASKED.get(stem, _rows(*BATCHES))]


def cut_sizes(stem: str, sizes: Sizes) -> Sizes:
    """The sizes of a model of which only some rows of large matrices are there."""
    cut = {name: min(count, getattr(sizes, name)) for name, count in CUT.get(stem, {}).items()}
    return replace(sizes, **cut)
