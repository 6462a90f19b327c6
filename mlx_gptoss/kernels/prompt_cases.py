"""Inputs for the kernels of prompts, as `cases` has them for those of a step."""

import mlx.core as mx

from mlx_gptoss.kernels import prompt_definitions
from mlx_gptoss.kernels.inputs import Arguments, Inputs
from mlx_gptoss.reference import choose_experts


def rms_norm(make: Inputs) -> Arguments:
    """Inputs of `kernels.rms_norm`."""
    s = make.sizes
    return {
        "x": make.normal(s.batch, s.tokens, s.hidden, scale=3),
        "weight": make.vector("attention_norm", s.hidden),
        "eps": 1e-5,
    }


def qkv_rope(make: Inputs) -> Arguments:
    """Inputs of `kernels.qkv_rope`: the queries of some of the tokens."""
    s, angle = make.sizes, make.normal(make.sizes.batch, 1, make.sizes.tokens, 32)
    widths = [64 * heads for heads in (s.q_heads, s.kv_heads, s.kv_heads)]
    counts = (max(1, s.tokens - 3), s.tokens, s.tokens)
    return {
        "products": tuple(make.normal(s.batch, *size) for size in zip(counts, widths, strict=True)),
        "biases": tuple(make.normal(width) for width in widths),
        "angles": (mx.cos(angle.astype(mx.float32)), mx.sin(angle.astype(mx.float32))),
    }


def extend_ring(make: Inputs) -> Arguments:
    """Inputs of `kernels.extend_ring`."""
    s = make.sizes
    ring, new = (
        tuple(make.normal(s.batch, s.kv_heads, rows, 64) for _ in range(2))
        for rows in (s.window, s.tokens)
    )
    return {"ring": ring, "new": new, "offset": s.base}


def attention_window_prefill(make: Inputs) -> Arguments:
    """Inputs of `kernels.attention_window_prefill`: rows begin before, in and after the window.

    The rows before position 0 or in the padding hold NaN.
    """
    s, offset = make.sizes, make.sizes.base
    start = mx.array([max(0, offset - 120 + 50 * row) for row in range(s.batch)], mx.int32)
    rows = s.window + s.tokens
    exists = (mx.arange(rows) + (offset - s.window) >= start[:, None])[:, None, :, None]
    nan = mx.array(mx.nan, dtype=make.dtype)
    keys, values = (
        mx.where(exists, make.normal(s.batch, s.kv_heads, rows, 64), nan) for _ in range(2)
    )
    return {
        "q": make.normal(s.batch, s.q_heads, s.tokens, 64),
        "keys": keys,
        "values": values,
        "sinks": make.vector("sinks", s.q_heads),
        "scale": 0.17,
        "offset": offset,
        "start": start,
    }


def route_prefill(make: Inputs) -> Arguments:
    """Inputs of `kernels.route_prefill`."""
    s = make.sizes
    return {
        "x": make.normal(s.tokens, s.hidden, scale=3),
        "norm": make.vector("moe_norm", s.hidden),
        "router": make.matrix("router", s.experts, s.hidden),
        "chosen": s.chosen,
        "eps": 1e-5,
    }


def _choice(make: Inputs) -> tuple[mx.array, mx.array]:
    """Experts and weights of random logits; none goes to expert 1."""
    s = make.sizes
    logits = make.normal(s.tokens, s.experts).astype(mx.float32)
    logits = mx.where(mx.arange(s.experts) == 1, -mx.inf, logits)
    return choose_experts(logits, chosen=s.chosen)


def expert_dispatch(make: Inputs) -> Arguments:
    """Inputs of `kernels.expert_dispatch`."""
    return {"experts": _choice(make)[0], "count": make.sizes.experts}


def swiglu_pairs(make: Inputs) -> Arguments:
    """Inputs of `kernels.swiglu_pairs`: some of the products are beyond the clamps."""
    s, found = make.sizes, prompt_definitions.expert_dispatch(**expert_dispatch(make))
    shape = (s.tokens * s.chosen, 1, s.inter)
    return {
        "products": (make.normal(*shape, scale=4), make.normal(*shape, scale=4)),
        "experts": found.experts,
        "biases": (make.expert_bias("gate", s.inter), make.expert_bias("up", s.inter)),
        "alpha": 1.702,
        "limit": 7.0,
    }


def sum_pairs(make: Inputs) -> Arguments:
    """Inputs of `kernels.sum_pairs`."""
    s, choice = make.sizes, _choice(make)
    return {
        "z": make.normal(s.tokens * s.chosen, 1, s.hidden),
        "inverse": prompt_definitions.expert_dispatch(choice[0], count=s.experts).inverse,
        "choice": choice,
        "bias": make.expert_bias("down", s.hidden),
        "residual": make.normal(s.tokens, s.hidden),
    }
