"""The attention block: norm, projections, rotation, sliding or full attention, output projection.

One token a row takes the decode form, several take the prefill form; both read and extend the
layer's cache, so a prompt may come in chunks of any size.

A batch has one cache for all its rows, or one for each: then the weights are multiplied for all
rows together, and each row attends over its own keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.cache import FullCache, WindowCache
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix, fused, on_cpu, unbiased_linear

Store = WindowCache | FullCache

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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the text a call's tokens are, and what every layer attends with."""

    angles: tuple[mx.array, mx.array]  # cos and sin of the new positions, from RopeTable.at
    starts: tuple[mx.array | None, ...]  # of each cache, (rows,) int32: first that is no padding
    head_dim: int
    eps: float  # of the norm
    scale: float  # of q . k, from rope.softmax_scale
    kernels: KernelSet


def attention_block(
    x: mx.array, weights: AttentionWeights, stores: Sequence[Store], place: Place
) -> mx.array:
    """Attend, and add to the residual stream; the caches take the new keys and values.

    Args:
        x: (B, T, D), the residual stream.
        weights: of this layer.
        stores: caches of this layer, one for all rows or one for each; their kind decides between
            sliding and full attention.
        place: of these tokens.

    Returns:
        (B, T, D) in the type of x.
    """
    new = _project(x, weights, place, queries=x.shape[1])
    q, k, v = (mx.split(rows, len(stores)) for rows in new)
    mixed = [
        _attend(q[n], k[n], v[n], weights.sinks, store, place, start=place.starts[n])
        for n, store in enumerate(stores)
    ]
    return _out_residual(mx.concatenate(mixed), weights.out, x)


def _attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    sinks: mx.array,
    store: Store,
    place: Place,
    *,
    start: mx.array | None,
) -> mx.array:
    if isinstance(store, WindowCache):
        return _sliding(q, k, v, sinks, store, place, start=start)
    return _full(q, k, v, sinks, store, scale=place.scale, start=start)


def _sliding(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    sinks: mx.array,
    cache: WindowCache,
    place: Place,
    *,
    start: mx.array | None,
) -> mx.array:
    rest = {"offset": cache.offset, "scale": place.scale, "start": start}
    if q.shape[2] == 1:
        return reference.attention_window(q, *cache.append(k, v), sinks, **rest)
    kernels = place.kernels
    keys, values = cache.extend(k, v, by=kernels.extend_ring)
    end = cache.offset
    if "attention_window_prefill" in kernels.fallbacks and end <= cache.window:
        # every key so far is in every query's window
        return _causal_attention(q, keys[:, :, -end:], values[:, :, -end:], sinks, **rest)
    return kernels.attention_window_prefill(q, keys, values, sinks, **rest)


def _full(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    sinks: mx.array,
    cache: FullCache,
    *,
    scale: float,
    start: mx.array | None,
) -> mx.array:
    if q.shape[2] == 1:
        return reference.attention_decode(q, cache.append(k, v), sinks, scale=scale, start=start)
    offset = cache.offset
    keys, values = cache.extend(k, v)
    return _causal_attention(q, keys, values, sinks, offset=offset, scale=scale, start=start)


def last_token_block(
    x: mx.array, weights: AttentionWeights, stores: Sequence[Store], place: Place
) -> mx.array:
    """As `attention_block` with one cache, but only the last token attends; the cache takes all T.

    Args:
        x: (B, T, D), the residual stream.
        weights: of this layer.
        stores: the cache of this layer.
        place: of these tokens.

    Returns:
        (B, 1, D) in the type of x.
    """
    if x.shape[1] == 1:
        return attention_block(x, weights, stores, place)
    (cache,), (start,) = stores, place.starts
    q, k, v = _project(x, weights, place, queries=1)
    rest = {"scale": place.scale, "start": start}
    if isinstance(cache, WindowCache):
        cache.extend(k, v, by=place.kernels.extend_ring)
        offset = cache.offset - 1
        mixed = reference.attention_window(q, *cache.arrays, weights.sinks, offset=offset, **rest)
    else:
        mixed = reference.attention_decode(q, [cache.extend(k, v)], weights.sinks, **rest)
    return _out_residual(mixed, weights.out, x[:, -1:])


def _project(
    x: mx.array, weights: AttentionWeights, place: Place, *, queries: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries of the last tokens, keys and values of all: as `reference.norm_qkv_rope` has them."""
    projections = (weights.q, weights.k, weights.v)
    if on_cpu():
        return reference.norm_qkv_rope(
            x,
            weights.norm,
            projections,
            place.angles,
            queries=queries,
            head_dim=place.head_dim,
            eps=place.eps,
        )
    y = place.kernels.rms_norm(x, weights.norm, eps=place.eps)
    inputs = (y[:, y.shape[1] - queries :], y, y)
    products = [unbiased_linear(*pair) for pair in zip(inputs, projections, strict=True)]
    return place.kernels.qkv_rope(products, [m.bias for m in projections], place.angles)


def _out_residual(x: mx.array, matrix: Matrix, residual: mx.array) -> mx.array:
    if on_cpu():
        return reference.out_residual(x, matrix, residual)
    assert matrix.bias is not None
    return _biased_sum(unbiased_linear(x, matrix), matrix.bias, residual)


@fused
def _biased_sum(y: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    total = y.astype(mx.float32) + bias.astype(mx.float32) + residual.astype(mx.float32)
    return total.astype(residual.dtype)


def _causal_attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    sinks: mx.array,
    *,
    scale: float,
    offset: int,
    start: mx.array | None,
) -> mx.array:
    attend = full_attention_in_blocks if on_cpu() else full_attention_fused
    return attend(q, keys, values, sinks, scale=scale, offset=offset, start=start)


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
