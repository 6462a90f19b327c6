"""From how many rows on a step groups its experts: data of `benchmarks/batch_card.py`.

A step of few rows reads the experts of each row; of more, `kernels.grouped` reads an expert once
for the rows that chose it, which takes two dispatches a layer more. The numbers weigh counted bytes
against dispatches for one chip: a prediction, not a measurement.

MLX's GEMMs read less than our dense kernels from 16 rows on, a third of the bytes at 32; with
plain weights by a few percent from 2 on; of the small router at any number of rows; and less than
the grouped experts of the 20b at 32 rows (the same card).
They are not taken: every kernel here gives a row the bits that it has alone, and a GEMM does not,
so that a conversation's tokens would depend on who else is being served.
"""

GROUPED_FROM = {32: 2, 128: 4}  # experts of a model: rows


def groups_experts(rows: int, experts: int) -> bool:
    """Whether a step of so many rows groups the experts of a model that has so many."""
    return rows >= next(n for most, n in GROUPED_FROM.items() if experts <= most)
