"""The mixture-of-experts block: norm, router, the chosen experts, their weighted sum.

Few tokens read their experts' weights one by one. From `GROUP_FROM` pairs on, the (token, expert)
pairs are sorted by expert first, so that an expert's weights are read once for all its tokens.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix, expert_linear, on_cpu

GROUP_FROM = 64  # (token, expert) pairs
CPU_ROWS = 4  # tokens at a time on the CPU, which multiplies row by row: more only take memory


@dataclass(frozen=True, kw_only=True)
class MoeWeights:
    """What one mixture-of-experts block multiplies by."""

    norm: mx.array  # (D,)
    router: Matrix  # (E, D)
    gate: Matrix  # (E, H, D)
    up: Matrix  # (E, H, D)
    down: Matrix  # (E, D, H)


def moe_block(
    x: mx.array,
    weights: MoeWeights,
    *,
    kernels: KernelSet,
    chosen: int,
    eps: float,
    limit: float,
    alpha: float,
) -> mx.array:
    """Run every token through its experts, and add to the residual stream.

    Args:
        x: (B, T, D), the residual stream.
        weights: of this layer.
        kernels: orders the pairs.
        chosen: K.
        eps: of the norm.
        limit: of the SwiGLU clamps.
        alpha: of the SwiGLU sigmoid.

    Returns:
        (B, T, D) in the type of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    step = CPU_ROWS if on_cpu() else rows.shape[0]
    rest = {"kernels": kernels, "chosen": chosen, "eps": eps, "limit": limit, "alpha": alpha}
    parts = [
        _experts(rows[first : first + step], weights, **rest)
        for first in range(0, rows.shape[0], step)
    ]
    return mx.concatenate(parts).reshape(x.shape)


def _experts(
    rows: mx.array,
    weights: MoeWeights,
    *,
    kernels: KernelSet,
    chosen: int,
    eps: float,
    limit: float,
    alpha: float,
) -> mx.array:
    """`moe_block` of tokens (N, D)."""
    y, experts, shares = reference.route(rows, weights.norm, weights.router, chosen=chosen, eps=eps)
    grouped = experts.size >= GROUP_FROM
    clamps = {"limit": limit, "alpha": alpha, "grouped": grouped}
    if not grouped:
        x = y[:, None, None]
        h = reference.experts_swiglu(x, experts, weights.gate, weights.up, **clamps)
        return reference.experts_down(h, experts, shares, weights.down, rows)
    by_expert = kernels.expert_dispatch(experts, count=weights.gate.weight.shape[0])
    pairs, x = by_expert.experts, y[by_expert.order // chosen][:, None]
    h = reference.experts_swiglu(x, pairs, weights.gate, weights.up, **clamps)  # (N*K, 1, H)
    z = expert_linear(h, weights.down, pairs, grouped=True)[by_expert.inverse]
    return reference.combine(z.reshape(*experts.shape, -1), shares, rows)
