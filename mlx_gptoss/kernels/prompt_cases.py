"""Inputs for the kernels of prompts, as `cases` has them for those of a step."""

import mlx.core as mx

from mlx_gptoss.kernels.inputs import Arguments, Inputs
from mlx_gptoss.reference import choose_experts


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


def expert_dispatch(make: Inputs) -> Arguments:
    """Inputs of `kernels.expert_dispatch`: `choose_experts` of random logits, none to expert 1."""
    s = make.sizes
    logits = make.normal(s.tokens, s.experts).astype(mx.float32)
    logits = mx.where(mx.arange(s.experts) == 1, -mx.inf, logits)
    experts, _ = choose_experts(logits, chosen=s.chosen)
    return {"experts": experts, "count": s.experts}
