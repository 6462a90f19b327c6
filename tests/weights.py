"""Weights of the tiny checkpoints under mlx-lm's names, built without the converter."""

import mlx.core as mx
import numpy as np
from tiny import Tensors, TinyShape, hf_config, hf_tensors, merged

from mlx_gptoss.checkpoint import MXFP4, Quantization, linear_modules
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.model import Model


def mlx_weights(tensors: Tensors) -> dict[str, mx.array]:
    """The Hugging Face layout's tensors as MLX multiplies them: gate and up rows taken apart."""
    weights: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        stem, _, kind = name.rpartition("_")
        if ".experts." not in name:
            weights[name] = array
            continue
        leaf = {"blocks": "weight", "scales": "scales", "bias": "bias"}[kind]
        if kind == "blocks":
            array = np.ascontiguousarray(array).view(np.uint32).reshape(*array.shape[:2], -1)
        if stem.endswith("gate_up_proj"):
            module = stem.removesuffix("gate_up_proj")
            weights[f"{module}gate_proj.{leaf}"] = array[:, 0::2]
            weights[f"{module}up_proj.{leaf}"] = array[:, 1::2]
        else:
            weights[f"{stem}.{leaf}"] = array
    return {name: as_mlx(array) for name, array in weights.items()}


def as_mlx(array: np.ndarray) -> mx.array:
    """uint16 stands for bfloat16 here."""
    out = mx.array(np.ascontiguousarray(array))
    return out.view(mx.bfloat16) if array.dtype == np.uint16 else out


def experts_packed(config: ModelConfig) -> dict[str, Quantization]:
    return {name: MXFP4 for name in linear_modules(config) if ".experts." in name}


def tiny_config(shape: TinyShape, **changes) -> ModelConfig:
    raw = merged(hf_config(shape), changes)
    return ModelConfig.from_json(raw, "tiny")


def tiny_model(
    shape: TinyShape | None = None, *, dtype: str = "float32", seed: int = 0, **changes
) -> Model:
    """A model of the tiny checkpoint; `changes` replace fields of config.json."""
    shape = shape or TinyShape()
    config = tiny_config(shape, **changes)
    weights = mlx_weights(hf_tensors(shape, seed))
    return Model(config, weights, quantization=experts_packed(config), dtype=dtype)
