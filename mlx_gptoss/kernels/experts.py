"""The expert kernels: gate and up with SwiGLU, down with the weighted sum, pairs by expert."""

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, expect, launch, number, require
from mlx_gptoss.kernels.matrix import expert_inputs, gate_and_up, simdgroups
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.reference import Dispatch

DISPATCH_SIMDGROUPS = 8


def experts_swiglu(
    x: mx.array,
    logits: mx.array,
    gate: Matrix,
    up: Matrix,
    *,
    chosen: int,
    alpha: float,
    limit: float,
) -> mx.array:
    """Gate and up projections of each row's `chosen` best experts, then the clamped SwiGLU.

    Args:
        x: (B, D), normalised. Unless float32, |x| < 65504: sqrt(D) * max |norm weight| bounds it.
        logits: (B, E) float32, of the router.
        gate: (E, H, D) MXFP4 with bias.
        up: as `gate`.
        chosen: K, experts of a row.
        alpha: gain of the sigmoid.
        limit: of the clamps.

    Returns:
        (B, K, H) in the type of x, the largest logit's expert first.
    """
    stem = "experts_swiglu"
    inputs = {"x": x, "logits": logits} | gate_and_up(stem, x, gate, up)
    (batch, width), (experts, hidden) = x.shape, gate.weight.shape[:2]
    expect(stem, "logits", logits, (batch, experts), mx.float32)
    require(stem, 0 < chosen <= experts, "chosen", f"1 to {experts}", chosen)
    groups = simdgroups(width)
    body = (
        f"threadgroup float sums[{32 * groups}];\n"
        f"experts_swiglu<{width}, {hidden}, {experts}, {chosen}>({', '.join(inputs)}, h, sums, "
        f"{number(alpha)}, {number(limit)}, $tile, $thread_id, $lane, $group);"
    )
    (h,) = launch(
        stem,
        inputs,
        {"h": ((batch, chosen, hidden), x.dtype)},
        body=body,
        groups=(hidden // 16, chosen, batch),
        threads=32 * groups,
    )
    return h


def experts_down(h: mx.array, logits: mx.array, down: Matrix, residual: mx.array) -> mx.array:
    """Down projections of each row's experts, summed by router weight, added to the residual.

    Args:
        h: (B, K, H); unless float32, |h| < 65504, which the clamps of SwiGLU see to.
        logits: (B, E) float32, of the router.
        down: (E, D, H) MXFP4 with bias.
        residual: (B, D) in the type of h.

    Returns:
        (B, D) in the type of h.
    """
    stem = "experts_down"
    batch, chosen, hidden = h.shape
    experts, width = down.weight.shape[:2]
    expect(stem, "h", h, (batch, chosen, hidden), *FLOATS)
    expect(stem, "logits", logits, (batch, experts), mx.float32)
    expect(stem, "residual", residual, (batch, width), h.dtype)
    groups = chosen * simdgroups(hidden)
    require(stem, 0 < groups <= 32, "simdgroups", "at most 32 for all chosen experts", groups)
    inputs = {"h": h, "logits": logits}
    inputs |= expert_inputs(stem, "down", down, (experts, width, hidden))
    inputs |= {"residual": residual}
    body = (
        f"threadgroup float sums[{16 * groups}];\n"
        f"experts_down<{hidden}, {width}, {experts}, {chosen}>({', '.join(inputs)}, y, sums, "
        "$tile, $thread_id, $lane, $group);"
    )
    (y,) = launch(
        stem,
        inputs,
        {"y": ((batch, width), h.dtype)},
        body=body,
        groups=(width // 16, batch, 1),
        threads=32 * groups,
    )
    return y


def expert_dispatch(experts: mx.array, *, count: int) -> Dispatch:
    """The (token, expert) pairs of a chunk or a batch, ordered by expert.

    Args:
        experts: (N, K) uint32, each below `count`.
        count: E, of all experts.

    Returns:
        See `reference.Dispatch`; pairs of one expert keep their order.
    """
    stem = "expert_dispatch"
    require(stem, experts.ndim == 2 and experts.size, "experts", "(N, K)", experts.shape)
    expect(stem, "experts", experts, experts.shape, mx.uint32)
    require(stem, count > 0, "count", "at least 1", count)
    body = (
        f"threadgroup uint counts[{2 * DISPATCH_SIMDGROUPS}];\n"
        f"expert_dispatch<{experts.shape[1]}, {DISPATCH_SIMDGROUPS}>(experts, tokens, inverse, "
        "sorted, offsets, counts, uint(experts_shape[0] * experts_shape[1]), "
        "threadgroups_per_grid.x, $tile, $lane, $group);"
    )
    places = ((experts.size,), mx.uint32)
    found = launch(
        stem,
        {"experts": experts},
        {
            "tokens": places,
            "inverse": places,
            "sorted": places,
            "offsets": ((count + 1,), mx.uint32),
        },
        body=body,
        groups=(count, 1, 1),
        threads=32 * DISPATCH_SIMDGROUPS,
    )
    return Dispatch(*found)
