"""Writes trained weights as the compact file of the package.

    python -m benchmarks.demo_model.export TRAINED.pt [--sharpen 2]

Prints the sha256 that `mlx_gptoss/demo.py` must name.
"""

import argparse
import hashlib
import lzma
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from benchmarks.demo_model.model import DemoModel, Layer, mxfp4

COMPACT = Path("mlx_gptoss/data/demo.safetensors.xz")
UNUSED_LOGIT = -32768.0  # of an unused token, before the division by the size of the hidden state


def bfloat16(weight: Tensor) -> np.ndarray:
    """The bits of the nearest bfloat16 values, as uint16."""
    return weight.detach().bfloat16().view(torch.uint16).numpy()


def packed(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """MXFP4 blocks (..., n/32, 16) uint8, low nibble first, and scales (..., n/32) uint8."""
    codes, exponent = mxfp4(weight.detach())
    codes = codes.to(torch.uint8).numpy()
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8).numpy()


def layer_tensors(model: DemoModel, layer: Layer) -> dict[str, np.ndarray]:
    """One layer under the published names; gate and up rows take turns."""
    free = model.free
    tensors = {
        "input_layernorm.weight": bfloat16(layer.norm1),
        "post_attention_layernorm.weight": bfloat16(layer.norm2),
        "self_attn.sinks": bfloat16(layer.sinks),
        "self_attn.o_proj.weight": bfloat16(layer.o * free[:, None]),
        "self_attn.o_proj.bias": bfloat16(layer.o_bias * free),
        "mlp.router.weight": bfloat16(layer.router),
        "mlp.router.bias": bfloat16(layer.router_bias),
        "mlp.experts.down_proj_bias": bfloat16(layer.down_bias * free),
    }
    for name in "qkv":
        tensors[f"self_attn.{name}_proj.weight"] = bfloat16(getattr(layer, name))
        tensors[f"self_attn.{name}_proj.bias"] = bfloat16(getattr(layer, f"{name}_bias"))
    gate_up = torch.stack([layer.gate, layer.up], 2).flatten(1, 2)
    gate_up_bias = torch.stack([layer.gate_bias, layer.up_bias], 2).flatten(1)
    tensors["mlp.experts.gate_up_proj_bias"] = bfloat16(gate_up_bias)
    for name, weight in (("gate_up_proj", gate_up), ("down_proj", layer.down * free[:, None])):
        blocks, scales = packed(weight)
        tensors[f"mlp.experts.{name}_blocks"] = blocks
        tensors[f"mlp.experts.{name}_scales"] = scales
    return tensors


def compact_tensors(
    model: DemoModel, vocabulary: list[int], *, sharpen: float
) -> dict[str, np.ndarray]:
    """All tensors; the last rows of embedding and unembedding are those of the other tokens."""
    others = UNUSED_LOGIT * model.reserved()
    unembedding = torch.cat([model.unembedding[:-1] * model.free * sharpen, others[None]])
    tensors = {
        "token_ids": np.array(vocabulary, np.int32),
        "model.embed_tokens.weight": bfloat16(model.embedding * model.free + model.reserved()),
        "model.norm.weight": bfloat16(model.norm * model.free + model.reserved()),
        "lm_head.weight": bfloat16(unembedding),
    }
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        for name, tensor in layer_tensors(model, layer).items():
            tensors[f"model.layers.{number}.{name}"] = np.ascontiguousarray(tensor)
    return tensors


def main() -> None:
    """Export and print the size and the hash."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--out", type=Path, default=COMPACT)
    parser.add_argument("--sharpen", type=float, default=2.0)
    arguments = parser.parse_args()
    saved = torch.load(arguments.trained)
    model = DemoModel(len(saved["vocabulary"]))
    model.load_state_dict(saved["model"])
    tensors = compact_tensors(model, saved["vocabulary"], sharpen=arguments.sharpen)
    data = lzma.compress(save(tensors), preset=9 | lzma.PRESET_EXTREME)
    arguments.out.write_bytes(data)
    print(f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
