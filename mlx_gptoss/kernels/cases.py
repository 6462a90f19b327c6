"""Inputs for the kernels of a step: for the first-use check, the tests, the counters."""

import mlx.core as mx
import numpy as np

from mlx_gptoss.kernels import definitions
from mlx_gptoss.kernels.inputs import Arguments, Inputs, Sizes
from mlx_gptoss.kernels.matrix import simdgroups
from mlx_gptoss.sampling import packed


def embed(make: Inputs) -> Arguments:
    """Inputs of `kernels.embed`: the first and the last token among them."""
    s = make.sizes
    matrix = make.matrix("embedding", s.vocab, s.hidden, bias=False)
    count = matrix.weight.shape[0]
    tokens = [(row * (count // 3) - row % 2) % count for row in range(s.batch)]
    return {
        "token": mx.array(tokens, dtype=mx.int32),
        "matrix": matrix,
        "width": s.hidden,
        "dtype": make.dtype,
    }


def norm_qkv_rope(make: Inputs) -> Arguments:
    """Inputs of `kernels.norm_qkv_rope`; tables of random angles mean what real ones mean."""
    s, control = make.sizes, make.control()
    angles = [make.normal(count, 32).astype(mx.float32) for count in (s.capacity // 128 + 2, 128)]
    coarse, fine = (mx.stack([mx.cos(a), mx.sin(a)], axis=1) for a in angles)
    heads = {"q": s.q_heads, "k": s.kv_heads, "v": s.kv_heads}
    return {
        "x": make.normal(s.batch, s.hidden, scale=3),
        "norm": make.vector("attention_norm", s.hidden),
        "projections": tuple(make.matrix(n, count * 64, s.hidden) for n, count in heads.items()),
        "rope": (coarse, fine),
        "control": control,
        "append": make.segment(s.rows, [s.rows] * s.batch),
        "eps": 1e-5,
    }


def attention_decode(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_decode`."""
    s = make.sizes
    q = make.normal(s.batch, s.q_heads, 64)
    return {"q": q, **make.segments(s.capacity), "splits": s.splits, "scale": 0.17}


def attention_reduce(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_reduce`; the last split has seen nothing."""
    s = make.sizes
    sums = make.normal(s.batch, s.q_heads, s.splits, 64).astype(mx.float32)
    tops = make.normal(s.batch, s.q_heads, s.splits, scale=4).astype(mx.float32)
    totals = mx.abs(make.normal(s.batch, s.q_heads, s.splits).astype(mx.float32)) + 1
    empty = (mx.arange(s.splits) == s.splits - 1) & (s.splits > 1)
    ends = mx.stack([mx.where(empty, -mx.inf, tops), mx.where(empty, 0, totals)], axis=-1)
    sums = mx.where(empty[:, None], 0, sums)
    sinks = make.vector("sinks", s.q_heads)
    return {"sums": sums, "ends": ends, "sinks": sinks, "dtype": make.dtype}


def attention_window(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_window`."""
    s = make.sizes
    q = make.normal(s.batch, s.q_heads, 64)
    found = make.segments(s.window)
    return {
        "q": q,
        "ring": found["frozen"],
        "append": found["append"],
        "sinks": make.vector("sinks", s.q_heads),
        "control": found["control"],
        "scale": 0.17,
    }


def out_residual(make: Inputs) -> Arguments:
    """Inputs of `kernels.out_residual`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.q_heads * 64),
        "matrix": make.matrix("out", s.hidden, s.q_heads * 64),
        "residual": make.normal(s.batch, s.hidden),
    }


def route(make: Inputs) -> Arguments:
    """Inputs of `kernels.route`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.hidden, scale=3),
        "norm": make.vector("moe_norm", s.hidden),
        "router": make.matrix("router", s.experts, s.hidden),
        "eps": 1e-5,
    }


def experts_swiglu(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_swiglu`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.hidden),
        "logits": make.logits(),
        "gate": make.expert_matrix("gate", s.inter, s.hidden),
        "up": make.expert_matrix("up", s.inter, s.hidden),
        "chosen": s.chosen,
        "alpha": 1.702,
        "limit": 7.0,
    }


def experts_down(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_down`."""
    s = make.sizes
    return {
        "h": make.normal(s.batch, s.chosen, s.inter),
        "logits": make.logits(),
        "down": make.expert_matrix("down", s.hidden, s.inter),
        "residual": make.normal(s.batch, s.hidden),
    }


def expert_groups(make: Inputs) -> Arguments:
    """Inputs of `kernels.expert_groups`."""
    return {"logits": make.crowded_logits(), "chosen": make.sizes.chosen}


def experts_swiglu_grouped(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_swiglu_grouped`: the rows' choices, in blocks."""
    given, logits = experts_swiglu(make), make.crowded_logits()
    blocks, _ = definitions.expert_groups(logits, chosen=make.sizes.chosen)
    del given["logits"]
    return given | {"blocks": blocks}


def experts_down_grouped(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_down_grouped`."""
    given = experts_down(make)
    blocks, choice = definitions.expert_groups(make.crowded_logits(), chosen=make.sizes.chosen)
    return {"h": given["h"], "blocks": blocks, "choice": choice, "down": given["down"]}


def experts_sum(make: Inputs) -> Arguments:
    """Inputs of `kernels.experts_sum`."""
    s = make.sizes
    _, choice = definitions.expert_groups(make.crowded_logits(), chosen=s.chosen)
    parts = simdgroups(s.inter)
    return {
        "sums": make.normal(s.batch, s.chosen, parts, s.hidden).astype(mx.float32),
        "choice": choice,
        "bias": make.expert_bias("down", s.hidden),
        "residual": make.normal(s.batch, s.hidden),
    }


def unembed(make: Inputs) -> Arguments:
    """Inputs of `kernels.unembed`: row 0 greedy, the others drawn; one tile has no allowed id."""
    s = make.sizes
    temperature = mx.zeros((s.batch, 8)) + 0.7 * (mx.arange(s.batch) > 0)[:, None]
    return {
        "x": make.normal(s.batch, s.hidden, scale=3),
        "norm": make.vector("norm", s.hidden),
        "matrix": make.matrix("unembedding", s.vocab, s.hidden, bias=False),
        "allowed": mx.array(packed(_allowed(s) & (np.arange(s.vocab) // 64 != 1))),
        "control": make.control(),
        "temperature": temperature,
        "eps": 1e-5,
    }


def sample_token(make: Inputs) -> Arguments:
    """Inputs of `kernels.sample_token`: candidates of all tiles but one."""
    s = make.sizes
    logits = make.normal(s.batch, s.vocab, scale=3).astype(mx.float32)
    best = _candidates(mx.where(mx.arange(s.vocab) // 64 == 1, -mx.inf, logits))
    return {"best": best, "logits": logits, "control": make.control()}


def sample_filtered(make: Inputs) -> Arguments:
    """Inputs of `kernels.sample_filtered`: every filter, alone and together.

    Many logits are equal; at 1e4 degrees any token that is kept may be drawn.
    """
    s = make.sizes
    allowed = _allowed(s)
    logits = mx.round(make.normal(s.batch, s.vocab, scale=3).astype(mx.float32))
    filters = [(1e4, 5, 1, 0), (1e4, 0, 0.3, 0), (1e4, 0, 1, 0.3), (2, 70, 0.8, 0.001),
               (0, 3, 0.5, 0), (0.8, 0, 1, 0), (1e4, 40, 0.5, 0)]  # fmt: skip
    rows = [[*filters[row % 7], 0, 0, 0, 0] for row in range(s.batch)]
    return {
        "best": _candidates(mx.where(mx.array(allowed), logits, -mx.inf)),
        "logits": logits,
        "allowed": mx.array(packed(allowed)),
        "control": make.control(),
        "sampling": mx.array(rows, dtype=mx.float32),
    }


def _allowed(sizes: Sizes) -> np.ndarray:
    """(B, V) bool: all but each fifth id, in each row others."""
    return (np.arange(sizes.vocab) + np.arange(sizes.batch)[:, None]) % 5 > 0


def _candidates(logits: mx.array) -> mx.array:
    """What `unembed` says of each 64 logits, without noise; logits of -inf are not allowed."""
    vocabulary = logits.shape[-1]
    parts = logits.reshape(logits.shape[0], -1, 64)
    peak = parts.max(-1)
    ids = mx.argmax(parts, axis=-1) + 64 * mx.arange(parts.shape[1])
    ids = mx.where(peak == -mx.inf, vocabulary, ids).astype(mx.float32)
    total = mx.where(parts == -mx.inf, 0, mx.exp(parts - peak[..., None])).sum(-1)
    return mx.stack([peak, ids, peak, total], axis=-1)
