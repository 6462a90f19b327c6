"""Every operation of gpt-oss in plain MLX: the definition that kernels are held to.

Each function that a kernel replaces carries the kernel's name. All sums, norms, softmaxes and the
router run in float32; activations are rounded to the model's type where one operation hands over
to the next, and nowhere else. The formulas follow OpenAI's torch model and transformers, which
agree; comments mark the places where other ports went wrong.

Shapes: B batch, T tokens, D hidden, Hq/Hkv heads, Dh head dim, E experts, K chosen, H expert width,
W window, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_gptoss import rope
from mlx_gptoss.matrix import Matrix, expert_linear, fused, in_float32, linear, matmul_type


def rms_norm(x: mx.array, weight: mx.array, *, eps: float) -> mx.array:
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight, (..., D) -> (..., D) float32.

    The weight multiplies before any rounding: `mx.fast.rms_norm` on bfloat16 would round first,
    which moves a quarter of its outputs by one unit.
    """
    return mx.fast.rms_norm(x.astype(mx.float32), weight.astype(mx.float32), eps)


def norm_qkv_rope(
    x: mx.array,
    norm: mx.array,
    projections: tuple[Matrix, Matrix, Matrix],
    angles: tuple[mx.array, mx.array],
    *,
    queries: int,
    head_dim: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """The norm before attention, the three projections, and the rotation of queries and keys.

    Args:
        x: (B, T, D), the residual stream.
        norm: (D,).
        projections: of q (Hq * Dh, D), k and v (Hkv * Dh, D), each with its bias.
        angles: cos and sin from `RopeTable.at`.
        queries: Q, the last tokens that attend.
        head_dim: Dh.
        eps: of the norm.

    Returns:
        q (B, Hq, Q, Dh), k and v (B, Hkv, T, Dh), in the type of x. The concentration of YaRN is
        not in q and k but in the softmax scale.
    """
    y, last = rms_norm(x, norm, eps=eps).astype(x.dtype), x.shape[1] - queries

    def heads(y: mx.array, matrix: Matrix) -> mx.array:
        out = linear(y, matrix)
        return out.reshape(*out.shape[:2], -1, head_dim).swapaxes(1, 2)

    wq, wk, wv = projections
    q, k, v = heads(y[:, last:], wq), heads(y, wk), heads(y, wv)
    q, k = rope.rotate(q, *(a[:, :, last:] for a in angles)), rope.rotate(k, *angles)
    return q.astype(x.dtype), k.astype(x.dtype), v.astype(x.dtype)


def attention(
    q: mx.array,
    segments: Sequence[tuple[mx.array, mx.array]],
    visible: mx.array | None,
    sinks: mx.array,
    *,
    scale: float,
) -> mx.array:
    """Softmax attention with one learned sink per query head, over keys in one or more segments.

    The sink is one more logit, neither scaled nor masked, whose probability is then dropped. So a
    query that sees no key gets zeros.

    Args:
        q: (B, Hq, T, Dh).
        segments: keys and values (B, Hkv, N, Dh) each; together S keys.
        visible: bool, broadcastable to (B, 1, 1, T, S); None if every query sees every key.
        sinks: (Hq,).
        scale: of q . k.

    Returns:
        (B, T, Hq * Dh) in the type of q.
    """
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads = segments[0][0].shape[1]
    grouped = q.astype(mx.float32).reshape(batch, kv_heads, -1, tokens, head_dim) * scale

    def wide(x: mx.array) -> mx.array:
        return x.astype(mx.float32)[:, :, None]

    scores = [grouped @ wide(k).swapaxes(-1, -2) for k, _ in segments]  # (B, Hkv, G, T, N)
    logits = mx.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0]
    if visible is not None:
        logits = mx.where(visible, logits, -mx.inf)
    sink = sinks.astype(mx.float32).reshape(kv_heads, -1, 1, 1)
    peak = mx.maximum(logits.max(-1, keepdims=True), sink)
    weights = mx.exp(logits - peak)
    total = weights.sum(-1, keepdims=True) + mx.exp(sink - peak)
    out, first = mx.zeros_like(grouped), 0
    for _, v in segments:
        out = out + weights[..., first : first + v.shape[2]] @ wide(v)
        first += v.shape[2]
    out = out / total  # here and not in the weights, which are S / Dh times as many
    out = out.reshape(batch, q_heads, tokens, head_dim).swapaxes(1, 2)
    return out.reshape(batch, tokens, -1).astype(q.dtype)


def attention_decode(
    q: mx.array,
    segments: Sequence[tuple[mx.array, mx.array]],
    sinks: mx.array,
    *,
    scale: float,
    start: mx.array | None,
) -> mx.array:
    """Full attention of one new token per row over everything before it and itself.

    Args:
        q: (B, Hq, 1, Dh).
        segments: keys and values (B, Hkv, N, Dh), oldest first, the new token last.
        sinks: (Hq,).
        scale: of q . k.
        start: (B,) int32, first position of each row that is not padding; None without padding.

    Returns:
        (B, 1, Hq * Dh) in the type of q.
    """
    visible = None
    if start is not None:
        count = sum(k.shape[2] for k, _ in segments)
        visible = mx.arange(count)[None] >= start[:, None]  # (B, S)
        visible = visible[:, None, None, None]
    return attention(q, segments, visible, sinks, scale=scale)


def attention_window(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    sinks: mx.array,
    *,
    scale: float,
    offset: int,
    start: mx.array | None,
) -> mx.array:
    """Sliding attention of one new token per row over a ring that already holds it.

    Args:
        q: (B, Hq, 1, Dh), at position `offset`.
        keys: (B, Hkv, W, Dh); position p lies in slot p % W, so the W last positions are here.
        values: as `keys`.
        sinks: (Hq,).
        scale: of q . k.
        offset: position of the new token.
        start: (B,) int32, first position of each row that is not padding; None without padding.

    Returns:
        (B, 1, Hq * Dh) in the type of q.
    """
    window = keys.shape[2]
    visible = None
    if start is not None or offset < window - 1:
        position = offset - (offset - mx.arange(window)) % window  # (W,), < 0: never written
        first = mx.zeros((1,), mx.int32) if start is None else start
        visible = (position[None] >= first[:, None])[:, None, None, None]
    return attention(q, [(keys, values)], visible, sinks, scale=scale)


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
    """Sliding attention of T new tokens, in blocks of W queries against two blocks of keys.

    A query sees the W keys that end with its own, so those of a block of W queries lie in the same
    block of keys and in the one before: T * 2W products instead of T * (W + T).

    Args:
        q: (B, Hq, T, Dh), at positions offset..offset+T-1.
        keys: (B, Hkv, W + T, Dh): the W positions before `offset` (anything, where there are none)
            and the new ones.
        values: as `keys`.
        sinks: (Hq,).
        scale: of q . k.
        offset: position of the first query.
        start: (B,) int32, first position of each row that is not padding; None without padding.

    Returns:
        (B, T, Hq * Dh) in the type of q.
    """
    batch, q_heads, tokens, head_dim = q.shape
    window = keys.shape[2] - tokens
    blocks = -(-tokens // window)
    padding = [(0, 0), (0, 0), (0, blocks * window - tokens), (0, 0)]

    def as_batch(x: mx.array) -> mx.array:  # (B, heads, blocks, N, Dh) -> (B * blocks, heads, ...)
        return x.swapaxes(1, 2).reshape(batch * blocks, x.shape[1], -1, head_dim)

    def two_blocks(x: mx.array) -> mx.array:
        x = mx.pad(x, padding).reshape(batch, -1, blocks + 1, window, head_dim)
        return as_batch(mx.concatenate([x[:, :, :-1], x[:, :, 1:]], axis=3))

    row, column = mx.arange(window)[:, None], mx.arange(2 * window)[None]
    band = (column > row) & (column <= row + window)  # column W + r is the query's own position
    first = mx.zeros((1,), mx.int32) if start is None else start
    block_start = offset - window + window * mx.arange(blocks)
    exists = (block_start[:, None] + column) >= first[:, None, None]  # (B, blocks, 2W)
    exists = mx.broadcast_to(exists, (batch, blocks, 2 * window))
    visible = exists.reshape(batch * blocks, 1, 1, 1, 2 * window) & band
    blocked = as_batch(mx.pad(q, padding).reshape(batch, q_heads, blocks, window, head_dim))
    out = attention(blocked, [(two_blocks(keys), two_blocks(values))], visible, sinks, scale=scale)
    return out.reshape(batch, blocks * window, -1)[:, :tokens]


def out_residual(x: mx.array, matrix: Matrix, residual: mx.array) -> mx.array:
    """The output projection of attention added to the residual stream, (B, T, D)."""
    return _sum(linear(x, matrix), residual)


@fused
def _sum(y: mx.array, residual: mx.array) -> mx.array:
    return (y.astype(mx.float32) + residual.astype(mx.float32)).astype(residual.dtype)


def route(
    x: mx.array, norm: mx.array, router: Matrix, *, chosen: int, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """The norm before the experts, and the choice of experts for every token.

    Args:
        x: (N, D), the residual stream, one row per token.
        norm: (D,).
        router: (E, D) with bias.
        chosen: K.
        eps: of the norm.

    Returns:
        y (N, D) in the type of x, normalised; experts and weights of `choose_experts`.
    """
    y, logits = router_logits(x, norm, router, eps=eps)
    return y, *choose_experts(logits, chosen=chosen)


def router_logits(
    x: mx.array, norm: mx.array, router: Matrix, *, eps: float
) -> tuple[mx.array, mx.array]:
    """The norm before the experts, and the router's logits of it before its rounding.

    Args:
        x: (N, D), the residual stream, one row per token.
        norm: (D,).
        router: (E, D) with bias.
        eps: of the norm.

    Returns:
        y (N, D) in the type of x, normalised; logits (N, E) float32.
    """
    y = rms_norm(x, norm, eps=eps)
    wide = router if router.mode is not None else in_float32(router)
    return y.astype(x.dtype), linear(y, wide)


def choose_experts(logits: mx.array, *, chosen: int) -> tuple[mx.array, mx.array]:
    """The K experts of largest logit.

    Args:
        logits: (N, E) float32.
        chosen: K.

    Returns:
        experts (N, K) uint32, largest logit first, equal logits by index; weights (N, K) float32,
        a softmax over the K logits, not over all E.
    """
    experts = mx.argsort(-logits, axis=-1)[..., :chosen].astype(mx.uint32)
    weights = mx.softmax(mx.take_along_axis(logits, experts, axis=-1), axis=-1, precise=True)
    return experts, weights


@fused
def swiglu(gate: mx.array, up: mx.array, *, limit: float, alpha: float) -> mx.array:
    """The clamped SwiGLU of gpt-oss: g sigmoid(alpha g) (u + 1), in float32.

    The gate is clamped from above only, the linear half on both sides.

    Args:
        gate: (..., H).
        up: (..., H).
        limit: of the clamps, 7 in the published models.
        alpha: gain of the sigmoid, 1.702.

    Returns:
        (..., H) float32.
    """
    gate = mx.minimum(gate.astype(mx.float32), limit)
    up = mx.clip(up.astype(mx.float32), -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)


def experts_swiglu(
    x: mx.array,
    experts: mx.array,
    gate: Matrix,
    up: Matrix,
    *,
    limit: float,
    alpha: float,
) -> mx.array:
    """Gate and up projections of each row's experts, biased, then `swiglu`.

    Args:
        x: (N, 1, 1, D).
        experts: (N, K) uint32.
        gate: (E, H, D).
        up: (E, H, D).
        limit: see `swiglu`.
        alpha: see `swiglu`.

    Returns:
        (N, K, 1, H) in the type of x.
    """
    wide = x.astype(matmul_type(x, gate))  # once for both
    g = expert_linear(wide, gate, experts, grouped=False)
    u = expert_linear(wide, up, experts, grouped=False)
    return swiglu(g, u, limit=limit, alpha=alpha).astype(x.dtype)


def experts_down(
    h: mx.array, experts: mx.array, weights: mx.array, down: Matrix, residual: mx.array
) -> mx.array:
    """Down projections, biased, summed by router weight in float32, added to the residual stream.

    Args:
        h: (N, K, 1, H).
        experts: (N, K) uint32.
        weights: (N, K) float32.
        down: (E, D, H).
        residual: (N, D).

    Returns:
        (N, D) in the type of the residual.
    """
    y = expert_linear(h, down, experts, grouped=False)[..., 0, :]  # (N, K, D)
    return combine(y, weights, residual)


@fused
def combine(y: mx.array, weights: mx.array, residual: mx.array) -> mx.array:
    """sum_k weights[k] * y[k] + residual, in float32; (N, K, D) -> (N, D)."""
    total = (y.astype(mx.float32) * weights[..., None]).sum(-2) + residual.astype(mx.float32)
    return total.astype(residual.dtype)


class Dispatch(NamedTuple):
    """(token, expert) pairs ordered by expert, P = N*K of them, all uint32.

    Attributes:
        tokens: (P,), the token at each sorted place.
        inverse: (P,), the sorted place of each pair.
        experts: (P,), the expert of each sorted place.
        offsets: (E + 1,), where each expert's places begin; the last is P.
    """

    tokens: mx.array
    inverse: mx.array
    experts: mx.array
    offsets: mx.array


def expert_dispatch(experts: mx.array, *, count: int) -> Dispatch:
    """Order the (token, expert) pairs by expert, so that each expert's weights are read once.

    Args:
        experts: (N, K) uint32.
        count: E, of all experts.

    Returns:
        The order; pairs of one expert keep theirs.
    """
    flat = experts.flatten()
    order = mx.argsort(flat * flat.size + mx.arange(flat.size, dtype=mx.uint32))
    lower = flat < mx.arange(count + 1, dtype=mx.uint32)[:, None]
    offsets = lower.sum(1).astype(mx.uint32)
    return Dispatch(order // experts.shape[1], mx.argsort(order), flat[order], offsets)


def final_logits(h: mx.array, matrix: Matrix) -> mx.array:
    """The unembedding, (..., D) -> (..., V) in the type that `linear` gives."""
    return linear(h, matrix)
