"""What each kernel of prompts means, as `definitions` says it of those of a step."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss import reference, rope
from mlx_gptoss.kernels.projections import Segment
from mlx_gptoss.matrix import Matrix, fused
from mlx_gptoss.ring import extend_ring as plain_extend_ring

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


def extend_ring(ring: Segment, new: Segment, *, offset: int) -> tuple[Segment, Segment]:
    """See `kernels.extend_ring`."""
    return plain_extend_ring(ring, new, offset=offset)


def attention_window_prefill(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    sinks: mx.array,
    *,
    scale: float,
    offset: int,
    start: mx.array | None,
) -> mx.array:
    """See `kernels.attention_window_prefill`."""
    return reference.attention_window_prefill(
        q, keys, values, sinks, scale=scale, offset=offset, start=start
    )


def route_prefill(
    x: mx.array, norm: mx.array, router: Matrix, *, chosen: int, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """See `kernels.route_prefill`."""
    return reference.route(x, norm, router, chosen=chosen, eps=eps)


def expert_dispatch(experts: mx.array, *, count: int) -> reference.Dispatch:
    """See `kernels.expert_dispatch`."""
    return reference.expert_dispatch(experts, count=count)


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
