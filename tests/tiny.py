"""Tiny random checkpoints in every layout that gpt-oss is published and fine-tuned in.

The same seed gives the same model in all layouts: "hf" and "original" hold the same bits, and
"dense" holds the bfloat16 weights whose MXFP4 rounding the other two hold. All sizes differ from
each other, so that a transposed or swapped dimension cannot go unnoticed; head_dim is the published
64 (YaRN's correction range assumes it) and the window the published 128.

    write_checkpoint(tmp_path / "source", layout="original", layers=3)
"""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Layout = Literal["hf", "original", "dense", "resaved"]
Tensors = dict[str, np.ndarray]  # uint16 stands for bfloat16

PUBLISHED_ROPE = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """Sizes of a tiny model; multiples of 32 (MXFP4) and of 64 where affine groups need it."""

    layers: int = 4
    hidden: int = 192
    inter: int = 160
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 12
    chosen: int = 4
    vocab: int = 1024
    window: int = 128


def write_checkpoint(
    folder: Path,
    *,
    layout: Layout = "hf",
    layers: int = 4,
    seed: int = 0,
    shape: TinyShape | None = None,
    shards: int = 3,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write one tiny checkpoint and return its folder.

    Args:
        folder: Created, with its parents; "original" writes straight into it.
        layout: "hf" as published on the hub; "original" as in OpenAI's `original/`; "dense" a
            bfloat16 fine-tune, experts `[E, in, out]`; "resaved" the same as transformers 5 saves
            a dequantised model: dense tensors under `*_blocks` names, `rope_parameters`.
        layers: Used where no shape is given.
        seed: Same seed, same model, in every layout.
        shape: All sizes, instead of the defaults with `layers`.
        shards: Number of files (not for "original", which is one file).
        config: Fields that replace those of config.json; None removes one.
    """
    shape = shape or TinyShape(layers=layers)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "original":
        tensors = original_tensors(hf_tensors(shape, seed))
        write_safetensors(folder / "model.safetensors", tensors)
        dtypes = {name: original_dtype(name, array) for name, array in tensors.items()}
        write_json(folder / "dtypes.json", dtypes)
        write_json(folder / "config.json", merged(original_config(shape), config))
        return folder
    if layout == "hf":
        tensors, raw = hf_tensors(shape, seed), hf_config(shape)
    else:
        suffix = "_blocks" if layout == "resaved" else ""
        tensors, raw = dense_tensors(shape, seed, suffix), dense_config(shape, layout)
    write_sharded(folder, tensors, shards)
    write_json(folder / "config.json", merged(raw, config))
    write_json(folder / "generation_config.json", {"do_sample": True, "eos_token_id": [1, 2]})
    return folder


# ---- tensors


def bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as uint16 bit patterns."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def normal(name: str, seed: int, size: tuple[int, ...], *, std: float, mean: float = 0.0):
    """Seeded by the tensor's name, so that a tensor does not depend on those before it."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return bf16(rng.standard_normal(size, dtype=np.float32) * np.float32(std) + np.float32(mean))


def quantize_mxfp4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (..., n * 32) to blocks (..., n, 16) and scales (..., n), low nibble first."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    peak = np.maximum(np.abs(groups).max(-1), np.float32(1e-30))
    exponent = np.floor(np.log2(peak)) - 2
    scaled = np.abs(groups) / np.exp2(exponent)[..., None]
    codes = np.searchsorted((E2M1[1:] + E2M1[:-1]) / 2, scaled).astype(np.uint8)
    codes |= np.signbit(groups).astype(np.uint8) << 3
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).astype(np.uint8)


def plan(s: TinyShape) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Dense tensors of the Hugging Face layout: name -> (shape, std, mean)."""
    q, kv = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
    wide = s.hidden**-0.5
    tensors: dict[str, tuple[tuple[int, ...], float, float]] = {}
    tensors["model.embed_tokens.weight"] = ((s.vocab, s.hidden), 1.0, 0.0)
    for n in range(s.layers):
        p = f"model.layers.{n}."
        tensors |= {
            p + "input_layernorm.weight": ((s.hidden,), 0.1, 1.0),
            p + "self_attn.q_proj.weight": ((q, s.hidden), 1.2 * wide, 0.0),
            p + "self_attn.q_proj.bias": ((q,), 0.1, 0.0),
            p + "self_attn.k_proj.weight": ((kv, s.hidden), 1.2 * wide, 0.0),
            p + "self_attn.k_proj.bias": ((kv,), 0.1, 0.0),
            p + "self_attn.v_proj.weight": ((kv, s.hidden), wide, 0.0),
            p + "self_attn.v_proj.bias": ((kv,), 0.1, 0.0),
            p + "self_attn.o_proj.weight": ((s.hidden, q), 1.5 * q**-0.5, 0.0),
            p + "self_attn.o_proj.bias": ((s.hidden,), 0.05, 0.0),
            p + "self_attn.sinks": ((s.q_heads,), 1.5, 1.0),
            p + "post_attention_layernorm.weight": ((s.hidden,), 0.1, 1.0),
            p + "mlp.router.weight": ((s.experts, s.hidden), 1.5 * wide, 0.0),
            p + "mlp.router.bias": ((s.experts,), 0.3, 0.0),
            # wide enough that a few per cent of the units pass swiglu_limit
            p + "mlp.experts.gate_up_proj": ((s.experts, 2 * s.inter, s.hidden), 3 * wide, 0.0),
            p + "mlp.experts.gate_up_proj_bias": ((s.experts, 2 * s.inter), 0.3, 0.0),
            p + "mlp.experts.down_proj": ((s.experts, s.hidden, s.inter), 0.02, 0.0),
            p + "mlp.experts.down_proj_bias": ((s.experts, s.hidden), 0.1, 0.0),
        }
    tensors["model.norm.weight"] = ((s.hidden,), 0.1, 1.0)
    tensors["lm_head.weight"] = ((s.vocab, s.hidden), 2 * wide, 0.0)
    return tensors


def master_tensors(shape: TinyShape, seed: int) -> Tensors:
    """The model before MXFP4: every tensor bfloat16, experts as rows of outputs."""
    return {
        name: normal(name, seed, size, std=std, mean=mean)
        for name, (size, std, mean) in plan(shape).items()
    }


def hf_tensors(shape: TinyShape, seed: int) -> Tensors:
    """Layout (a): experts as MXFP4 `_blocks` and `_scales`."""
    tensors: Tensors = {}
    for name, array in master_tensors(shape, seed).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = quantize_mxfp4(bf16_to_f32(array))
            tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
        else:
            tensors[name] = array
    return tensors


def dense_tensors(shape: TinyShape, seed: int, suffix: str = "") -> Tensors:
    """Layout (c): experts bfloat16 `[E, in, out]`, as transformers multiplies them."""
    return {
        name + suffix * name.endswith(("gate_up_proj", "down_proj")): (
            np.ascontiguousarray(array.swapaxes(1, 2)) if array.ndim == 3 else array
        )
        for name, array in master_tensors(shape, seed).items()
    }


ORIGINAL_NAMES = (
    ("model.embed_tokens.weight", "embedding.weight"),
    ("model.norm.weight", "norm.scale"),
    ("lm_head.weight", "unembedding.weight"),
    ("model.layers.", "block."),
    ("input_layernorm.weight", "attn.norm.scale"),
    ("post_attention_layernorm.weight", "mlp.norm.scale"),
    ("self_attn.sinks", "attn.sinks"),
    ("self_attn.o_proj", "attn.out"),
    ("self_attn.qkv", "attn.qkv"),
    ("mlp.router", "mlp.gate"),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
    ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."),
    ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
)


def original_tensors(hf: Tensors) -> Tensors:
    """Layout (b): OpenAI's names, and the rows of q, k and v in one tensor."""
    tensors: Tensors = {}
    for name, array in hf.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            array = np.concatenate([hf[name.replace("q_proj", x + "_proj")] for x in "qkv"])
            name = name.replace("q_proj", "qkv")
        for ours, theirs in ORIGINAL_NAMES:
            name = name.replace(ours, theirs)
        tensors[name] = array
    return tensors


def original_dtype(name: str, array: np.ndarray) -> str:
    """The name that `dtypes.json` gives to a tensor's numbers."""
    if array.dtype == np.uint16:
        return "BF16"
    return "FP4" if name.endswith("blocks") else "UE8"


# ---- files


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write one file; uint16 is declared as BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        dtype = {"uint16": "BF16", "uint8": "U8", "uint32": "U32", "float32": "F32"}[
            str(array.dtype)
        ]
        span = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


def write_sharded(folder: Path, tensors: Tensors, shards: int) -> None:
    """Write zero-based shards and the index, named as openai/gpt-oss-20b names them."""
    total = sum(array.nbytes for array in tensors.values())
    groups: list[Tensors] = [{} for _ in range(shards)]
    done = 0
    for name, array in tensors.items():
        groups[done * shards // total][name] = array
        done += array.nbytes
    weight_map = {}
    for n, group in enumerate(groups):
        file = f"model-{n:05d}-of-{shards - 1:05d}.safetensors"
        write_safetensors(folder / file, group)
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- configs


def merged(raw: dict[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """`raw` with fields replaced, or removed where the new value is None."""
    return {k: v for k, v in {**raw, **(changes or {})}.items() if v is not None}


def hf_config(s: TinyShape) -> dict[str, Any]:
    """config.json with the fields of openai/gpt-oss-20b."""
    kinds = ["sliding_attention", "full_attention"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": min(200002, s.vocab - 1),
        "experts_per_token": s.chosen,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": s.inter,
        "layer_types": [kinds[n % 2] for n in range(s.layers)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": s.q_heads,
        "num_experts_per_tok": s.chosen,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "num_local_experts": s.experts,
        "output_router_logits": False,
        "pad_token_id": min(199999, s.vocab - 2),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": dict(PUBLISHED_ROPE),
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": s.window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": s.vocab,
    }


def dense_config(s: TinyShape, layout: str) -> dict[str, Any]:
    """config.json of a bfloat16 fine-tune, by an older ("dense") or newer ("resaved") library."""
    raw = hf_config(s)
    del raw["quantization_config"]
    if layout == "dense":
        return raw | {"torch_dtype": "bfloat16"}
    rope = {"rope_theta": raw.pop("rope_theta"), **raw.pop("rope_scaling")}
    return raw | {"dtype": "bfloat16", "rope_parameters": rope, "transformers_version": "5.23.0"}


def original_config(s: TinyShape) -> dict[str, Any]:
    """config.json of OpenAI's `original/`: the keywords of its reference model."""
    return {
        "num_hidden_layers": s.layers,
        "num_experts": s.experts,
        "experts_per_token": s.chosen,
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.inter,
        "swiglu_limit": 7.0,
        "head_dim": s.head_dim,
        "num_attention_heads": s.q_heads,
        "num_key_value_heads": s.kv_heads,
        "sliding_window": s.window,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }
