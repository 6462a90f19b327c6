"""The mixture-of-experts block: norm, router, the chosen experts, their weighted sum.

Few tokens read their experts' weights one by one. From `GROUP_FROM` pairs on, the (token, expert)
pairs are sorted by expert first, so that an expert's weights are read once for all its tokens.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix, expert_linear, on_cpu, unbiased

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
        kernels: what runs between the products.
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
    matrices = gate, up, down = weights.gate, weights.up, weights.down
    clamps = {"limit": limit, "alpha": alpha}
    y, experts, shares = kernels.route_prefill(
        rows, weights.norm, weights.router, chosen=chosen, eps=eps
    )
    if experts.size < GROUP_FROM:
        h = reference.experts_swiglu(y[:, None, None], experts, gate, up, **clamps)
        return reference.experts_down(h, experts, shares, down, rows)
    return sorted_experts(rows, y, (experts, shares), matrices, kernels=kernels, **clamps)


def sorted_experts(
    rows: mx.array,
    y: mx.array,
    choice: tuple[mx.array, mx.array],
    matrices: tuple[Matrix, Matrix, Matrix],
    *,
    kernels: KernelSet,
    limit: float,
    alpha: float,
) -> mx.array:
    """The chosen experts of each row by MLX's products, over pairs sorted by expert.

    Args:
        rows: (N, D), the residual stream.
        y: (N, D), normalised.
        choice: experts (N, K) uint32 and weights (N, K) float32.
        matrices: gate and up (E, H, D), down (E, D, H).
        kernels: what runs between the products.
        limit: of the SwiGLU clamps.
        alpha: of the SwiGLU sigmoid.

    Returns:
        (N, D) in the type of the rows.
    """
    (gate, up, down), (experts, _) = matrices, choice
    by_expert = kernels.expert_dispatch(experts, count=gate.weight.shape[0])

    def product(x: mx.array, matrix: Matrix) -> mx.array:
        z = expert_linear(x, unbiased(matrix), by_expert.experts, grouped=True)
        return z.astype(rows.dtype)

    x = y[by_expert.tokens][:, None]  # (N*K, 1, D)
    h = kernels.swiglu_pairs(
        (product(x, gate), product(x, up)),
        by_expert.experts,
        (gate.bias, up.bias),
        limit=limit,
        alpha=alpha,
    )
    return kernels.sum_pairs(product(h, down), by_expert.inverse, choice, down.bias, rows)
