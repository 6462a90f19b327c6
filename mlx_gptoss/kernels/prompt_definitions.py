"""What each kernel of prompts means, as `definitions` says it of those of a step."""

import mlx.core as mx

from mlx_gptoss import reference


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


def expert_dispatch(experts: mx.array, *, count: int) -> reference.Dispatch:
    """See `kernels.expert_dispatch`."""
    return reference.expert_dispatch(experts, count=count)
