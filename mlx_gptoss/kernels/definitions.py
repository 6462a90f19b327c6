"""What each kernel means: the same call in plain MLX, made of the operations of `reference.py`.

These run where a kernel is not used, and are what a kernel is held to where it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_gptoss import matrix as matrices
from mlx_gptoss import reference
from mlx_gptoss.kernels.attention import LOG2_E, TILE
from mlx_gptoss.kernels.grouped import BLOCK, COLUMNS, most_blocks
from mlx_gptoss.kernels.matrix import simdgroups
from mlx_gptoss.kernels.projections import Segment
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.rope import RopeTable
from mlx_gptoss.sampling import SamplingRows, gumbel, sample, unpacked

out_residual = reference.out_residual


def embed(token: mx.array, matrix: Matrix, *, width: int, dtype: mx.Dtype) -> mx.array:
    """See `kernels.embed`."""
    return matrices.embed(token, matrix, dtype)[:, :width]


def norm_qkv_rope(
    x: mx.array,
    norm: mx.array,
    projections: Sequence[Matrix],
    rope: tuple[mx.array, mx.array],
    *,
    control: mx.array,
    append: Segment,
    eps: float,
) -> tuple[mx.array, Segment]:
    """See `kernels.norm_qkv_rope`; rows above the slot keep what they were."""
    wq, wk, wv = projections
    angles = RopeTable(*rope).at(control[:, :1])
    q, k, v = reference.norm_qkv_rope(
        x[:, None],
        norm,
        (wq, wk, wv),
        angles,
        queries=1,
        head_dim=append[0].shape[-1],
        eps=eps,
    )
    here = (mx.arange(append[0].shape[2]) == control[:, 2:3])[:, None, :, None]
    return q[:, :, 0], (mx.where(here, k, append[0]), mx.where(here, v, append[1]))


def attention_decode(
    q: mx.array, frozen: Segment, append: Segment, *, control: mx.array, splits: int, scale: float
) -> tuple[mx.array, mx.array]:
    """See `kernels.attention_decode`; all keys are in the first split."""
    base, live = control[:, 1:2], control[:, 2:3] + 1
    in_frozen, in_append = (mx.arange(s[0].shape[2])[None] for s in (frozen, append))
    frozen_tiles = -(-base // TILE)
    tiles = frozen_tiles - (-live // TILE)  # (B, 1)
    tile = mx.concatenate([in_frozen // TILE + 0 * base, frozen_tiles + in_append // TILE], axis=-1)
    counts = mx.concatenate([in_frozen < base, in_append < live], axis=-1)  # (B, N)
    split = mx.arange(splits)[None, :, None]
    first, last = (tiles[..., None] * (split + i) // splits for i in (0, 1))
    seen = counts[:, None] & (tile[:, None] >= first) & (tile[:, None] < last)  # (B, S, N)

    batch, heads, dims = q.shape
    k, v = (mx.concatenate(list(pair), axis=2) for pair in zip(frozen, append, strict=True))
    grouped = q.astype(mx.float32).reshape(batch, k.shape[1], -1, dims)
    scores = grouped @ k.astype(mx.float32).swapaxes(-1, -2) * (scale * LOG2_E)
    scores = mx.where(seen[:, None, None], scores[..., None, :], -mx.inf)  # (B, Hkv, G, S, N)
    top = scores.max(-1, keepdims=True)
    weights = mx.where(scores == -mx.inf, 0, mx.power(2.0, scores - top))
    sums = weights @ v.astype(mx.float32)[:, :, None]
    ends = mx.concatenate([top, weights.sum(-1, keepdims=True)], axis=-1)
    return sums.reshape(batch, heads, splits, dims), ends.reshape(batch, heads, splits, 2)


def attention_reduce(
    sums: mx.array, ends: mx.array, sinks: mx.array, *, dtype: mx.Dtype
) -> mx.array:
    """See `kernels.attention_reduce`."""
    tops, totals = ends[..., 0], ends[..., 1]  # (B, Hq, S)
    sink = sinks.astype(mx.float32)[None, :, None] * LOG2_E
    top = mx.maximum(tops.max(-1, keepdims=True), sink)
    factors = mx.power(2.0, tops - top)
    total = (factors * totals).sum(-1, keepdims=True) + mx.power(2.0, sink - top)
    y = (factors[..., None] * sums).sum(2) / total  # (B, Hq, 64)
    return y.reshape(y.shape[0], -1).astype(dtype)


def attention_window(
    q: mx.array,
    ring: Segment,
    append: Segment,
    sinks: mx.array,
    *,
    control: mx.array,
    scale: float,
) -> mx.array:
    """See `kernels.attention_window`."""
    window = ring[0].shape[2]
    position, base, slot = (control[:, i : i + 1] for i in range(3))
    row = mx.arange(window)[None]
    turn = base // window * window + row
    in_ring = mx.where(turn < base, turn, turn - window)  # the latest position before base
    place = mx.arange(append[0].shape[2])[None]
    seen = mx.concatenate(
        [
            (in_ring >= 0) & (in_ring > position - window),
            (place <= slot) & (base + place > position - window),
        ],
        axis=-1,
    )
    visible = seen[:, None, None, None]
    return reference.attention(q[:, :, None], [ring, append], visible, sinks, scale=scale)[:, 0]


def route(x: mx.array, norm: mx.array, router: Matrix, *, eps: float) -> tuple[mx.array, mx.array]:
    """See `kernels.route`."""
    return reference.router_logits(x, norm, router, eps=eps)


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
    """See `kernels.experts_swiglu`."""
    experts, _ = reference.choose_experts(logits, chosen=chosen)
    h = reference.experts_swiglu(x[:, None, None], experts, gate, up, limit=limit, alpha=alpha)
    return h[:, :, 0]


def experts_down(h: mx.array, logits: mx.array, down: Matrix, residual: mx.array) -> mx.array:
    """See `kernels.experts_down`."""
    experts, weights = reference.choose_experts(logits, chosen=h.shape[1])
    return reference.experts_down(h[:, :, None], experts, weights, down, residual)


def expert_groups(logits: mx.array, *, chosen: int) -> tuple[mx.array, mx.array]:
    """See `kernels.expert_groups`."""
    experts, weights = reference.choose_experts(logits, chosen=chosen)
    found = reference.expert_dispatch(experts, count=logits.shape[1])
    sorted_experts = found.experts.astype(mx.int32)
    place, offsets = mx.arange(experts.size), found.offsets.astype(mx.int32)
    rank = place - offsets[sorted_experts]
    block = mx.cumsum(rank % BLOCK == 0) - 1
    most = most_blocks(experts.size, logits.shape[1])
    first = mx.zeros((most,), mx.int32).at[block].maximum(place - rank % BLOCK)
    count = mx.zeros((most,), mx.int32).at[block].add(1)
    column = mx.arange(BLOCK)
    pairs = mx.argsort(found.inverse).astype(mx.int32)[
        first[:, None] + mx.where(column < count[:, None], column, 0)
    ]
    filled = mx.concatenate([sorted_experts[first][:, None], count[:, None], pairs], axis=1)
    blocks = mx.pad(mx.where(count[:, None] > 0, filled, 0), [(0, 0), (0, COLUMNS - BLOCK - 2)])
    return blocks, mx.stack([experts.astype(mx.float32), weights], axis=-1)


def _experts_of(blocks: mx.array, batch: int, chosen: int) -> mx.array:
    """The expert of each pair, out of the blocks."""
    pairs = batch * chosen
    place = mx.where(mx.arange(BLOCK) < blocks[:, 1:2], blocks[:, 2 : 2 + BLOCK], pairs)
    found = mx.zeros((pairs + 1,), mx.int32).at[place].maximum(blocks[:, :1])
    return found[:pairs].reshape(batch, chosen).astype(mx.uint32)


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
    """See `kernels.experts_swiglu_grouped`."""
    experts = _experts_of(blocks, x.shape[0], chosen)
    h = reference.experts_swiglu(x[:, None, None], experts, gate, up, limit=limit, alpha=alpha)
    return h[:, :, 0]


def experts_down_grouped(h: mx.array, blocks: mx.array, choice: mx.array, down: Matrix) -> mx.array:
    """See `kernels.experts_down_grouped`."""
    experts, parts = _experts_of(blocks, *h.shape[:2]), simdgroups(h.shape[-1])
    assert down.bias is not None
    unbiased = replace(down, bias=mx.zeros_like(down.bias))
    own = mx.arange(h.shape[-1]) * parts // h.shape[-1] == mx.arange(parts)[:, None]
    sums = [
        matrices.expert_linear(mx.where(part, h, 0)[:, :, None], unbiased, experts, grouped=False)
        for part in own
    ]
    return mx.concatenate(sums, axis=2).astype(mx.float32) * choice[..., 1:, None]


def experts_sum(sums: mx.array, choice: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    """See `kernels.experts_sum`."""
    biases = bias.astype(mx.float32)[choice[..., 0].astype(mx.uint32)]
    y = sums.sum(2) + biases * choice[..., 1:]
    return (residual.astype(mx.float32) + y.sum(1)).astype(residual.dtype)


def unembed(
    x: mx.array,
    norm: mx.array,
    matrix: Matrix,
    *,
    allowed: mx.array,
    control: mx.array,
    temperature: mx.array,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """See `kernels.unembed`."""
    logits = reference.final_logits(reference.rms_norm(x, norm, eps=eps), matrix)
    best = candidates(logits, allowed, control=control, temperature=temperature)
    return logits, best


def candidates(
    logits: mx.array, allowed: mx.array, *, control: mx.array, temperature: mx.array
) -> mx.array:
    """One candidate for the next token out of every 64 of logits (B, V), see `kernels.unembed`."""
    batch, vocabulary = logits.shape
    masked = mx.where(unpacked(allowed, vocabulary), logits, -mx.inf)
    divisor = temperature[:, :1]
    noise = gumbel(
        control[:, 3:5].astype(mx.uint32), control[:, 0] + 1, ids=mx.arange(vocabulary)[None]
    )
    scores = mx.where(divisor > 0, masked / mx.maximum(divisor, 1e-6) + noise, masked)
    tiles = scores.reshape(batch, -1, 64)
    parts = masked.reshape(batch, -1, 64)
    first = mx.argmax(tiles, axis=-1)
    score = mx.take_along_axis(tiles, first[..., None], axis=-1)[..., 0]
    ids = first + 64 * mx.arange(tiles.shape[1])
    peak = parts.max(-1)
    total = mx.where(parts == -mx.inf, 0, mx.exp(parts - peak[..., None])).sum(-1)
    ids = mx.where(score == -mx.inf, vocabulary, ids).astype(mx.float32)
    return mx.stack([score, ids, peak, total], axis=-1)


def sample_token(
    best: mx.array, logits: mx.array, *, control: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """See `kernels.sample_token`."""
    winner = mx.argmax(best[..., 0], axis=-1, keepdims=True)
    token = mx.take_along_axis(best[..., 1], winner, axis=-1).astype(mx.int32)[:, 0]
    return token, *_after(token, best, logits, control)


def sample_filtered(
    best: mx.array,
    logits: mx.array,
    *,
    allowed: mx.array,
    control: mx.array,
    sampling: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """See `kernels.sample_filtered`."""
    temperature, top_k, top_p, min_p = mx.split(sampling[:, :4], 4, axis=-1)
    rows = SamplingRows(
        temperature=temperature,
        top_k=mx.where(top_k > 0, top_k, logits.shape[-1]).astype(mx.int32),
        top_p=top_p,
        min_p=min_p,
        key=control[:, 3:5].astype(mx.uint32),
        draws=True,
        sorts=True,
    )
    flags = unpacked(allowed, logits.shape[-1])
    token = sample(logits, control[:, 0] + 1, rows=rows, allowed=flags)
    return token, *_after(token, best, logits, control)


def _after(
    token: mx.array, best: mx.array, logits: mx.array, control: mx.array
) -> tuple[mx.array, mx.array]:
    """The log-probability of a chosen token, and the next step's control."""
    peak = best[..., 2].max(-1)
    total = (mx.exp(best[..., 2] - peak[:, None]) * best[..., 3]).sum(-1)
    logprob = mx.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - peak - mx.log(total)
    return logprob, control + mx.array([1, 0, 1, 0, 0, 0, 0, 0], dtype=mx.int32)
