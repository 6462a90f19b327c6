"""The attention block: norm, projections, rotation, sliding or full attention, output projection.

One token a row takes the decode form, several take the prefill form; both read and extend the
layer's cache, so a prompt may come in chunks of any size.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.cache import FullCache, WindowCache
from mlx_gptoss.matrix import Matrix

QUERY_BLOCK = 64  # on the CPU, full attention holds Hq * 64 * S float32 scores, not Hq * T * S


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """What one attention block multiplies by."""

    norm: mx.array  # (D,)
    q: Matrix  # (Hq * Dh, D)
    k: Matrix  # (Hkv * Dh, D)
    v: Matrix  # (Hkv * Dh, D)
    out: Matrix  # (D, Hq * Dh)
    sinks: mx.array  # (Hq,)


def attention_block(
    x: mx.array,
    weights: AttentionWeights,
    cache: WindowCache | FullCache,
    angles: tuple[mx.array, mx.array],
    *,
    start: mx.array | None,
    head_dim: int,
    eps: float,
    scale: float,
) -> mx.array:
    """Attend, and add to the residual stream; the cache takes the new keys and values.

    Args:
        x: (B, T, D), the residual stream.
        weights: of this layer.
        cache: of this layer; its kind decides between sliding and full attention.
        angles: cos and sin of the new positions, from `RopeTable.at`.
        start: (B,) int32, first position of each row that is not padding; None without padding.
        head_dim: Dh.
        eps: of the norm.
        scale: of q . k, from `rope.softmax_scale`.

    Returns:
        (B, T, D) in the type of x.
    """
    projections = weights.q, weights.k, weights.v
    q, k, v = reference.norm_qkv_rope(
        x, weights.norm, projections, angles, head_dim=head_dim, eps=eps
    )
    offset, one_token = cache.offset, x.shape[1] == 1
    if isinstance(cache, WindowCache):
        attend = reference.attention_window if one_token else reference.attention_window_prefill
        keys, values = cache.append(k, v) if one_token else cache.extend(k, v)
        mixed = attend(q, keys, values, weights.sinks, scale=scale, offset=offset, start=start)
    elif one_token:
        segments = cache.append(k, v)
        mixed = reference.attention_decode(q, segments, weights.sinks, scale=scale, start=start)
    else:
        keys, values = cache.extend(k, v)
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        attend = full_attention_in_blocks if on_cpu else full_attention_fused
        mixed = attend(q, keys, values, weights.sinks, scale=scale, offset=offset, start=start)
    return reference.out_residual(mixed, weights.out, x)


def _causal(offset: int, tokens: int, start: mx.array | None) -> mx.array:
    """Which of the keys 0..offset+T-1 each of T queries sees, (1 or B, 1, 1, T, S) bool."""
    key = mx.arange(offset + tokens)
    visible = (key[None] <= (offset + mx.arange(tokens))[:, None])[None]  # (1, T, S)
    if start is not None:
        visible = visible & (key >= start[:, None, None])
    return visible[:, None, None]


def full_attention_in_blocks(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    sinks: mx.array,
    *,
    scale: float,
    offset: int,
    start: mx.array | None,
) -> mx.array:
    """Causal attention of T queries, block by block of queries, each over the keys up to its end.

    Args:
        q: (B, Hq, T, Dh), at positions offset..offset+T-1.
        keys: (B, Hkv, offset + T, Dh).
        values: as `keys`.
        sinks: (Hq,).
        scale: of q . k.
        offset: position of the first query.
        start: (B,) int32, first position of each row that is not padding; None without padding.

    Returns:
        (B, T, Hq * Dh) in the type of q.
    """
    out = []
    for first in range(0, q.shape[2], QUERY_BLOCK):
        block = q[:, :, first : first + QUERY_BLOCK]
        end = offset + first + block.shape[2]
        segment = keys[:, :, :end], values[:, :, :end]
        visible = _causal(offset + first, block.shape[2], start)
        out.append(reference.attention(block, [segment], visible, sinks, scale=scale))
    return mx.concatenate(out, axis=1)


def full_attention_fused(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    sinks: mx.array,
    *,
    scale: float,
    offset: int,
    start: mx.array | None,
) -> mx.array:
    """The same as `full_attention_in_blocks` by MLX's fused kernel, which holds no scores on Metal.

    Its CPU form rounds scores to the type of q, so it is not used there.

    Args:
        q: (B, Hq, T, Dh), at positions offset..offset+T-1.
        keys: (B, Hkv, offset + T, Dh).
        values: as `keys`.
        sinks: (Hq,).
        scale: of q . k.
        offset: position of the first query.
        start: (B,) int32, first position of each row that is not padding; None without padding.

    Returns:
        (B, T, Hq * Dh) in the type of q.
    """
    batch, _, tokens, _ = q.shape
    mask = "causal" if start is None else _causal(offset, tokens, start)[:, :, 0]
    out = mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=scale, mask=mask, sinks=sinks.astype(q.dtype)
    )
    return out.swapaxes(1, 2).reshape(batch, tokens, -1)
