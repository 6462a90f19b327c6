"""Which form of an operation a step of several rows takes: data of `benchmarks/batch_card.py`.

The rule. Up to `EXACT_ROWS` rows, the most that an engine decodes together, our kernels take every
operation: each gives a row the bits that it has alone, so no conversation's tokens depend on who
else is being served. The card would rather have MLX's product for the attention's output at 15 and
16 rows and for the 120b's router from 13 on; what that costs is below 3% of a layer's predicted
time. From `EXACT_ROWS + 1` rows on, whichever form the card favours from there on; a row's last
bits may then depend on its company.

The experts have two forms of ours, with the same bits: a step of few rows reads the experts of each
row; of more, `kernels.grouped` reads an expert once for the rows that chose it, which takes two
dispatches a layer more.

The card weighs counted bytes against dispatches for one chip: a prediction, not a measurement.
`tests/test_kernels_batches.py` holds these tables to it.
"""

from collections.abc import Mapping
from typing import Literal

EXACT_ROWS = 16

# Experts of a model, rows. A model of another size goes by the next larger one, or the largest.
GROUPED_FROM: Mapping[int, int] = {32: 2, 128: 4}

# By packing, or by experts of a model: rows from which on MLX's product is the faster; where there
# are none, our kernel is, up to 32.
MLX_FROM: Mapping[str, Mapping[str | int, int]] = {
    "norm_qkv_rope": {"plain": 17, "q8": 17},
    "out_residual": {"plain": 16, "q8": 15, "q4": 15},
    "route": {128: 13},
    "unembed": {"plain": 17},
    "experts": {32: 32},
}

Form = Literal["rows", "grouped", "mlx"]


def takes_mlx(operation: str, packing_or_experts: str | int, rows: int) -> bool:
    """Whether a step of so many rows multiplies by MLX's product instead of our kernel.

    Args:
        operation: of `MLX_FROM`.
        packing_or_experts: see `dense_form`; of the router and the experts, their number.
        rows: of the step.
    """
    kind = packing_or_experts
    first = MLX_FROM[operation].get(_size(kind) if isinstance(kind, int) else kind)
    return first is not None and rows >= max(first, EXACT_ROWS + 1)


def experts_form(experts: int, rows: int) -> Form:
    """How a step of so many rows reads the experts of a model that has so many."""
    if takes_mlx("experts", experts, rows):
        return "mlx"
    return "grouped" if rows >= GROUPED_FROM[_size(experts)] else "rows"


def _size(experts: int) -> int:
    return min((size for size in GROUPED_FROM if experts <= size), default=max(GROUPED_FROM))
