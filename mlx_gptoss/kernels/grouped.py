"""The expert kernels of a batch: rows that chose the same expert share one reading of it.

`expert_groups` puts the (row, choice) pairs p = row * K + choice into blocks of one expert; the
grouped kernels launch a threadgroup for each block, and `experts_sum` joins what they leave. Two
dispatches a layer more than without groups; which batches gain from it is in `batches.py`.
"""

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, expect, launch, number, require
from mlx_gptoss.kernels.matrix import expert_inputs, gate_and_up, simdgroups
from mlx_gptoss.matrix import Matrix

BLOCK = 4  # pairs of a block: two for each of two sets of simdgroups
SINGLE = ("experts_swiglu", "experts_down")  # of the same bits, row by row
GROUPED = ("expert_groups", "experts_down_grouped", "experts_sum", "experts_swiglu_grouped")
MOST_PAIRS = 1024  # threads of the one threadgroup that orders them
COLUMNS = 8  # of a block: expert, count, pairs, padding


def most_blocks(pairs: int, experts: int) -> int:
    """Blocks that `pairs` pairs can need: as many experts as there may be have a block begun."""
    used = min(pairs, experts)
    return used + (pairs - used) // BLOCK


def expert_groups(logits: mx.array, *, chosen: int) -> tuple[mx.array, mx.array]:
    """Each row's best experts, and the pairs of rows and experts in blocks of one expert.

    Args:
        logits: (B, E) float32, of the router.
        chosen: K, experts of a row; B * K at most 32 times the smaller of B and 32.

    Returns:
        blocks (M, 8) int32: expert, count, pairs, 0, 0; pairs past the count repeat the first,
        blocks past the last are 0. choice (B, K, 2) float32: expert and router weight.
    """
    stem = "expert_groups"
    batch, experts = logits.shape
    expect(stem, "logits", logits, (batch, experts), mx.float32)
    require(stem, 0 < chosen <= experts < 2**24, "chosen", f"1 to {experts}", chosen)
    pairs, simds = batch * chosen, min(batch, 32)
    require(stem, pairs <= 32 * simds, "pairs", f"at most {32 * simds}", pairs)
    most = most_blocks(pairs, experts)
    body = (
        f"threadgroup uint experts[{MOST_PAIRS}];\nthreadgroup uint ranks[{MOST_PAIRS}];\n"
        f"expert_groups<{experts}, {chosen}>(logits, blocks, choice, experts, ranks, "
        "logits_shape[0], $thread_id, $lane, $group);"
    )
    blocks, choice = launch(
        stem,
        {"logits": logits},
        {
            "blocks": ((most, COLUMNS), mx.int32),
            "choice": ((batch, chosen, 2), mx.float32),
        },
        body=body,
        groups=(1, 1, 1),
        threads=32 * simds,
    )
    return blocks, choice


def experts_swiglu_grouped(
    x: mx.array,
    blocks: mx.array,
    gate: Matrix,
    up: Matrix,
    *,
    chosen: int,
    alpha: float,
    limit: float,
) -> mx.array:
    """`experts_swiglu` with an expert read once for the rows of a block.

    Args:
        x: (B, D), normalised. Unless float32, |x| < 65504: sqrt(D) * max |norm weight| bounds it.
        blocks: (M, 8) int32, of `expert_groups`.
        gate: (E, H, D) MXFP4 with bias.
        up: as `gate`.
        chosen: K, experts of a row.
        alpha: gain of the sigmoid.
        limit: of the clamps.

    Returns:
        (B, K, H) in the type of x.
    """
    stem = "experts_swiglu_grouped"
    inputs = {"x": x, "blocks": blocks} | gate_and_up(stem, x, gate, up)
    (batch, width), (experts, hidden) = x.shape, gate.weight.shape[:2]
    most = most_blocks(batch * chosen, experts)
    expect(stem, "blocks", blocks, (most, COLUMNS), mx.int32)
    groups = simdgroups(width)
    body = (
        f"threadgroup float sums[{BLOCK * 32 * groups}];\n"
        f"experts_swiglu_grouped<{width}, {hidden}, {chosen}>({', '.join(inputs)}, h, sums, "
        f"{number(alpha)}, {number(limit)}, $tile, $thread_id, $lane, $group);"
    )
    (h,) = launch(
        stem,
        inputs,
        {"h": ((batch, chosen, hidden), x.dtype)},
        body=body,
        groups=(hidden // 16, most, 1),
        threads=64 * groups,
    )
    return h


def experts_down_grouped(h: mx.array, blocks: mx.array, choice: mx.array, down: Matrix) -> mx.array:
    """The weighted down projections of every pair, with an expert read once for a block.

    Args:
        h: (B, K, H); unless float32, |h| < 65504, which the clamps of SwiGLU see to.
        blocks: (M, 8) int32, of `expert_groups`.
        choice: (B, K, 2) float32, likewise.
        down: (E, D, H) MXFP4; its bias is for `experts_sum`.

    Returns:
        (B, K, parts, D) float32, one sum for each simdgroup's columns.
    """
    stem = "experts_down_grouped"
    batch, chosen, hidden = h.shape
    experts, width = down.weight.shape[:2]
    expect(stem, "h", h, (batch, chosen, hidden), *FLOATS)
    most, parts = most_blocks(batch * chosen, experts), simdgroups(hidden)
    expect(stem, "blocks", blocks, (most, COLUMNS), mx.int32)
    expect(stem, "choice", choice, (batch, chosen, 2), mx.float32)
    inputs = {"h": h, "blocks": blocks, "choice": choice}
    inputs |= expert_inputs(stem, "down", down, (experts, width, hidden))
    del inputs["down_b"]
    arguments = f"{', '.join(inputs)}, sums, $tile, $lane, $group"
    (sums,) = launch(
        stem,
        inputs,
        {"sums": ((batch, chosen, parts, width), mx.float32)},
        body=f"experts_down_grouped<{hidden}, {width}>({arguments});",
        groups=(width // 16, most, 1),
        threads=64 * parts,
    )
    return sums


def experts_sum(sums: mx.array, choice: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    """What `experts_down` returns, out of the sums of `experts_down_grouped`.

    Args:
        sums: (B, K, parts, D) float32.
        choice: (B, K, 2) float32, of `expert_groups`.
        bias: (E, D), of the down projections.
        residual: (B, D).

    Returns:
        (B, D) in the type of the residual.
    """
    stem = "experts_sum"
    (batch, chosen, parts, width), experts = sums.shape, bias.shape[0]
    expect(stem, "sums", sums, (batch, chosen, parts, width), mx.float32)
    expect(stem, "choice", choice, (batch, chosen, 2), mx.float32)
    expect(stem, "bias", bias, (experts, width), *FLOATS)
    expect(stem, "residual", residual, (batch, width), *FLOATS)
    require(stem, width % 32 == 0, "columns", "a multiple of 32", width)
    inputs = {"sums": sums, "choice": choice, "bias": bias, "residual": residual}
    (y,) = launch(
        stem,
        inputs,
        {"y": ((batch, width), residual.dtype)},
        body=f"experts_sum<{width}, {chosen}, {parts}>({', '.join(inputs)}, y, $tile, $lane);",
        groups=(width // 32, batch, 1),
        threads=32,
    )
    return y
