"""The mixture-of-experts block: norm, router, the chosen experts, their weighted sum.

Few tokens read their experts' weights one by one. From `GROUP_FROM` pairs on, the (token, expert)
pairs are sorted by expert first, so that an expert's weights are read once for all its tokens.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.matrix import Matrix, expert_linear

GROUP_FROM = 64  # (token, expert) pairs


@dataclass(frozen=True, kw_only=True)
class MoeWeights:
    """What one mixture-of-experts block multiplies by."""

    norm: mx.array  # (D,)
    router: Matrix  # (E, D)
    gate: Matrix  # (E, H, D)
    up: Matrix  # (E, H, D)
    down: Matrix  # (E, D, H)


def moe_block(
    x: mx.array, weights: MoeWeights, *, chosen: int, eps: float, limit: float, alpha: float
) -> mx.array:
    """Run every token through its experts, and add to the residual stream.

    Args:
        x: (B, T, D), the residual stream.
        weights: of this layer.
        chosen: K.
        eps: of the norm.
        limit: of the SwiGLU clamps.
        alpha: of the SwiGLU sigmoid.

    Returns:
        (B, T, D) in the type of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    y, experts, shares = reference.route(rows, weights.norm, weights.router, chosen=chosen, eps=eps)
    if experts.size < GROUP_FROM:
        h = reference.experts_swiglu(
            y[:, None, None],
            experts,
            weights.gate,
            weights.up,
            limit=limit,
            alpha=alpha,
            grouped=False,
        )
        return reference.experts_down(h, experts, shares, weights.down, rows).reshape(x.shape)
    order, inverse = reference.expert_dispatch(experts)
    sorted_experts = experts.flatten()[order]
    h = reference.experts_swiglu(
        y[order // chosen][:, None],
        sorted_experts,
        weights.gate,
        weights.up,
        limit=limit,
        alpha=alpha,
        grouped=True,
    )  # (N*K, 1, H)
    z = expert_linear(h, weights.down, sorted_experts, grouped=True)
    z = z[inverse].reshape(*experts.shape, -1)  # (N, K, D)
    return reference.combine(z, shares, rows).reshape(x.shape)
