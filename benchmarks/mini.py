"""The `mini` model: the published widths with 2 layers and random weights, for us and for mlx-lm.

Both models hold the very same arrays, so that their memory can be compared: nothing is converted
or copied for one of them. Bytes and shapes are what speed depends on; values need only be finite.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_gptoss.checkpoint import MXFP4, Quantization, expected_tensors, linear_modules
from mlx_gptoss.config import GPT_OSS_20B, ModelConfig, alternating_layer_types
from mlx_gptoss.model import Model

LAYERS = 2
CONFIG: ModelConfig = dataclasses.replace(
    GPT_OSS_20B, num_hidden_layers=LAYERS, layer_types=alternating_layer_types(LAYERS)
)
QUANTIZATION: Mapping[str, Quantization] = {
    module: MXFP4 for module in linear_modules(CONFIG) if ".experts." in module
}


def weights(dtype: mx.Dtype) -> dict[str, mx.array]:
    """Random weights under mlx-lm's names; dense ones of `dtype`, experts MXFP4."""
    mx.random.seed(0)
    arrays = {}
    for name, spec in expected_tensors(CONFIG, QUANTIZATION).items():
        if spec.dtype == "U32":
            arrays[name] = mx.random.randint(0, 2**32 - 1, spec.shape, mx.uint32)
        elif spec.dtype == "U8":  # 2^-6..2^-3: hidden states stay of order 1
            arrays[name] = mx.random.randint(119, 122, spec.shape).astype(mx.uint8)
        else:
            width = spec.shape[-1] ** -0.5 if len(spec.shape) == 2 else 1.0
            values = mx.random.uniform(-1.7 * width, 1.7 * width, spec.shape, dtype=mx.bfloat16)
            arrays[name] = values.astype(dtype)
        mx.eval(arrays[name])
    return arrays


def ours(arrays: dict[str, mx.array], dtype: str) -> Model:
    """Our model over these arrays, by the MLX operations every device has."""
    return Model(CONFIG, arrays, quantization=QUANTIZATION, dtype=dtype)


def peer(arrays: dict[str, mx.array]) -> Any:
    """mlx-lm's model over the same arrays."""
    import mlx.nn as nn
    from mlx_lm.models import gpt_oss

    args = gpt_oss.ModelArgs.from_dict(CONFIG.to_json())
    model = gpt_oss.Model(args)
    nn.quantize(
        model,
        group_size=MXFP4.group_size,
        bits=MXFP4.bits,
        mode=MXFP4.mode,
        class_predicate=lambda path, _: f"{path}.scales" in arrays,
    )
    model.load_weights(list(arrays.items()))
    return model


def card() -> dict[str, int]:
    """Bytes that one decoded token must read, by part, in bfloat16; no machine can read fewer."""
    c = CONFIG
    sizes = {"attention": 0, "experts": 0, "unembedding": 0}
    for name, spec in expected_tensors(c, QUANTIZATION).items():
        if ".experts." in name:
            sizes["experts"] += spec.nbytes * c.num_experts_per_tok // c.num_local_experts
        elif name.startswith("lm_head"):
            sizes["unembedding"] += spec.nbytes
        elif not name.startswith("model.embed_tokens"):
            sizes["attention"] += spec.nbytes
    return sizes
