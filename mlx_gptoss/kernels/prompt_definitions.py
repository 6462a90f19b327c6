"""What each kernel of prompts means, as `definitions` says it of those of a step."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss import reference, ring, rope
from mlx_gptoss.matrix import fused

attention_window_prefill = reference.attention_window_prefill
expert_dispatch = reference.expert_dispatch
extend_ring = ring.extend_ring
route_prefill = reference.route

_rotate = fused(rope.rotate)


@fused
def _biased(product: mx.array, bias: mx.array) -> mx.array:
    return product.astype(mx.float32) + bias.astype(mx.float32)


def rms_norm(x: mx.array, weight: mx.array, *, eps: float) -> mx.array:
    """See `kernels.rms_norm`."""
    return reference.rms_norm(x, weight, eps=eps).astype(x.dtype)


def qkv_rope(
    products: Sequence[mx.array],
    biases: Sequence[mx.array],
    angles: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """See `kernels.qkv_rope`."""
    cos, sin = angles

    def heads(product: mx.array, bias: mx.array) -> mx.array:
        out = _biased(product, bias)
        return out.reshape(*out.shape[:2], -1, 2 * cos.shape[-1]).swapaxes(1, 2)

    q, k, v = (heads(*pair) for pair in zip(products, biases, strict=True))
    late = cos.shape[2] - q.shape[2]
    q, k = _rotate(q, cos[:, :, late:], sin[:, :, late:]), _rotate(k, cos, sin)
    dtype = products[0].dtype
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def swiglu_pairs(
    products: tuple[mx.array, mx.array],
    experts: mx.array,
    biases: tuple[mx.array, mx.array],
    *,
    alpha: float,
    limit: float,
) -> mx.array:
    """See `kernels.swiglu_pairs`."""
    g, u = (
        _biased(product, bias[experts][:, None])
        for product, bias in zip(products, biases, strict=True)
    )
    return reference.swiglu(g, u, limit=limit, alpha=alpha).astype(products[0].dtype)


def sum_pairs(
    z: mx.array,
    inverse: mx.array,
    choice: tuple[mx.array, mx.array],
    bias: mx.array,
    residual: mx.array,
) -> mx.array:
    """See `kernels.sum_pairs`."""
    experts, shares = choice
    y = z[inverse].reshape(*experts.shape, -1)
    return reference.combine(_biased(y, bias[experts]), shares, residual)
