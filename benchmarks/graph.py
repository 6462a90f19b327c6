"""mlx-lm's decode step, and chunks of prompts, counted without Metal; kernels that do nothing."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gptoss import attention, matrix, moe
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.dispatches import Counted, count_lazy
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model

Functions = dict[tuple[Any, str], Callable[..., Any]]  # by module and name

CHUNK = 512  # tokens
WIDTH = 64  # of the traced mlx-lm models: their graphs do not depend on it
# The fused primitives that MLX's CPU takes apart, and our kernels: a rare operation for each.
STAND_INS = {"ErfInv": "RMSNorm", "ArcSinh": "RoPE", "ArcTanh": "SDPA", "ArcCosh": "Dequantize",
             "Tan": "CustomKernel"}  # fmt: skip


def stand_in_kernels() -> KernelSet:
    """Kernels that compute nothing and make as many arrays, for timing the host's side."""
    outputs = {
        "attention_decode": 2,
        "expert_groups": 2,
        "route": 2,
        "unembed": 2,
        "norm_qkv_rope": 3,
        "sample_token": 3,
    }

    def stand_in(count: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            arrays = _arrays((args, tuple(kwargs.values())))
            made = mx.depends((arrays * count)[:count], arrays[1:])
            if count == 3 and "append" in kwargs:
                return made[0], (made[1], made[2])
            return made[0] if count == 1 else tuple(made)

        return call

    return KernelSet({stem: stand_in(outputs.get(stem, 1)) for stem in KERNELS}, {})


def _arrays(value: Any) -> list[mx.array]:
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, Matrix):
        return [a for f in fields(value) for a in _arrays(getattr(value, f.name))]
    items = value.values() if isinstance(value, Mapping) else value
    return [a for i in items for a in _arrays(i)] if isinstance(items, list | tuple) else []


def mlx_lm_counts(config: ModelConfig, dense: str) -> Counted:
    """One decode step of mlx-lm, 600 tokens into a text, greedy, as its own loop builds it.

    Two and four of its layers are traced at small widths, which the graph does not depend on; the
    rest follows by addition.
    """
    with _replaced(_fused_primitives()):
        two, four = (_mlx_lm_step(config, dense, layers)[0] for layers in (2, 4))
    return _all_layers(config, two, four)


def _all_layers(config: ModelConfig, two: Counted, four: Counted) -> Counted:
    pairs = (config.num_hidden_layers - 2) // 2
    return Counted(
        kernels=two.kernels + pairs * (four.kernels - two.kernels),
        depth=two.depth + pairs * (four.depth - two.depth),
        inputs=two.inputs + pairs * (four.inputs - two.inputs),
    )


def chunk_counts(model: Model, kernels: KernelSet) -> Counted:
    """The first chunk of a prompt, whose logits nobody needs, as Metal runs it.

    Args:
        model: of hidden size `WIDTH`; what it computes is not looked at.
        kernels: launches or definitions.
    """
    tokens, metal = mx.zeros((1, CHUNK), mx.int32), {}
    for module in (attention, matrix, moe):
        metal[module, "on_cpu"] = lambda: False
    counted, cache = copy(model), model.make_cache()
    counted.kernels = kernels
    mx.eval(tokens, cache.arrays, model.arrays, model.rope.coarse, model.rope.fine)
    with _replaced(_fused_primitives() | metal | {(mx.fast, "metal_kernel"): _stand_in_kernel}):
        counted.hidden(tokens, cache)
    return count_lazy(*cache.arrays, names=STAND_INS)


def _stand_in_kernel(**_: Any) -> Callable[..., list[mx.array]]:
    """One operation for each launch, whose outputs are as they would be."""

    def call(*, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
        launched = mx.tan(mx.depends([mx.array(0.0)], inputs)[0])
        shapes = zip(output_shapes, output_dtypes, strict=True)
        outputs = [mx.zeros(shape, dtype) for shape, dtype in shapes]
        mx.eval(outputs)
        return mx.depends(outputs, [launched])

    return call


def mlx_lm_chunk_counts(config: ModelConfig, dense: str) -> Counted:
    """The same chunk of mlx-lm."""

    def count(layers: int) -> Counted:
        model, tokens = _mlx_lm_model(config, dense, layers), mx.zeros((1, CHUNK), mx.int32)
        mx.eval(tokens)
        caches = model.make_cache()
        model(tokens, cache=caches)
        return count_lazy(*(a for c in caches for a in (c.keys, c.values)), names=STAND_INS)

    with _replaced(_fused_primitives()):
        return _all_layers(config, count(2), count(4))


def mlx_lm_host_ms(config: ModelConfig, dense: str) -> float:
    """Median CPU time to build one of its steps with all layers, in ms."""
    with _replaced(_fused_primitives()):
        return _mlx_lm_step(config, dense, config.num_hidden_layers)[1]


def _fused_primitives() -> Functions:
    """One operation for each that Metal fuses; `mx.depends` carries the other inputs."""

    def rms_norm(x: mx.array, weight: mx.array, eps: float, **_: Any) -> mx.array:
        return mx.erfinv(mx.depends([x], [weight])[0])

    def rope(x: mx.array, _: int, *, freqs: mx.array, **__: Any) -> mx.array:
        return mx.arcsinh(mx.depends([x], [freqs])[0])

    def sdpa(q: mx.array, k: mx.array, v: mx.array, **more: Any) -> mx.array:
        others = [a for a in (k, v, more.get("mask"), more.get("sinks")) if isinstance(a, mx.array)]
        return mx.arctanh(mx.depends([q], others)[0])

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array, *_: Any, **__: Any) -> mx.array:
        y = mx.arccosh(mx.depends([mx.view(w, mx.bfloat16)], [scales, biases])[0])
        return mx.broadcast_to(y[..., :1], (*w.shape[:-1], WIDTH))

    return {
        (mx.fast, "rms_norm"): rms_norm,
        (mx.fast, "rope"): rope,
        (mx.fast, "scaled_dot_product_attention"): sdpa,
        (mx, "dequantize"): dequantize,
    }


@contextmanager
def _replaced(functions: Functions) -> Iterator[None]:
    kept = {(module, name): getattr(module, name) for module, name in functions}
    try:
        for (module, name), function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)


def _mlx_lm_step(config: ModelConfig, dense: str, layers: int) -> tuple[Counted, float]:
    """Its graph, and the median CPU time to build it in ms."""
    model = _mlx_lm_model(config, dense, layers)
    token, times = mx.zeros((1,), mx.int32), []
    for _ in range(20):
        caches = _caches(model)
        started = time.thread_time()
        logits = model(token[None], cache=caches)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        chosen = mx.argmax(logprobs, axis=-1)
        times.append(1e3 * (time.thread_time() - started))
    counted = count_lazy(chosen, logprobs, names=STAND_INS)
    return counted, round(statistics.median(times), 2)


def _mlx_lm_model(config: ModelConfig, dense: str, layers: int) -> Any:
    from mlx_lm.models import gpt_oss

    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096}  # fmt: skip
    model = gpt_oss.Model(
        gpt_oss.ModelArgs(
            num_hidden_layers=layers,
            num_local_experts=config.num_local_experts,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            vocab_size=1024,
            rope_scaling=yarn,
        )
    )
    model.set_dtype(mx.bfloat16)

    def packing(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        if "experts" in path:
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return {"bf16": False, "q8": {"group_size": 64, "bits": 8}}.get(
            dense, {"group_size": 64, "bits": 4}
        )

    nn.quantize(model, class_predicate=packing)
    mx.eval(model.parameters())
    for layer in model.layers:  # inverse frequencies are lazy too
        mx.eval(layer.self_attn.rope._freqs)
    return model


def _caches(model: Any) -> list[Any]:
    caches = model.make_cache()
    for cache in caches:
        rows = getattr(cache, "max_size", None) or 768
        cache.keys = mx.zeros((1, 8, rows, 64), mx.bfloat16)
        cache.values = mx.zeros((1, 8, rows, 64), mx.bfloat16)
        cache.offset = 600
        if hasattr(cache, "_idx"):
            cache._idx = 600 % rows
        mx.eval(cache.keys, cache.values)
    return caches
