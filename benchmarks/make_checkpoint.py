"""Write a checkpoint with random weights in the exact layout of openai/gpt-oss-20b.

    python benchmarks/make_checkpoint.py FOLDER --size mini|full20b|finetune [--seed 0]

`full20b` has the 459 tensors and 13,761,264,768 bytes of the published one; `mini` is its first two
layers with the whole vocabulary (3.3 GB); `finetune` its first layer with bfloat16 experts, as
fine-tunes are saved (4.0 GB). Weights are made and written 16 MB at a time. They are
random but tame: activations, router and attention logits have the spread of a real model's, and a
few per cent of the expert units pass the swiglu limit.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_gptoss.config import GPT_OSS_20B, ModelConfig, alternating_layer_types
from mlx_gptoss.convert.names import Layout, dense_expert_spec, source_tensors
from mlx_gptoss.weight_files import INDEX, TensorSpec, safetensors_header

LAYERS = {"mini": 2, "full20b": 24, "finetune": 1}
SHARDS = 3
CHUNK = 1 << 23  # weights made at a time
E2M1_RMS = 2.93  # of the 16 code values, all equally frequent

# Standard deviations, by the end of the name; those of matrices are divided by sqrt(inputs).
WIDE = {
    "q_proj.weight": 1.2,
    "k_proj.weight": 1.2,
    "v_proj.weight": 1.0,
    "o_proj.weight": 1.5,
    "router.weight": 1.5,
    "lm_head.weight": 2.0,
    "gate_up_proj": 3.0,
    "down_proj": 0.25,
}
NARROW = {
    "embed_tokens.weight": 1.0,
    "norm.weight": 0.1,
    "sinks": 1.5,
    "router.bias": 0.3,
    "gate_up_proj_bias": 0.3,
    "bias": 0.1,
}
ONE_CENTRED = ("norm.weight", "sinks")


def model_config(size: str) -> ModelConfig:
    """The published 20b shape, with as many of its layers as the size says."""
    layers = LAYERS[size]
    kinds = alternating_layer_types(layers)
    return replace(GPT_OSS_20B, num_hidden_layers=layers, layer_types=kinds)


def make_checkpoint(folder: Path, *, size: str, seed: int = 0) -> None:
    """Write config, shards and index into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(size)
    tensors = source_tensors(config, Layout.HUGGING_FACE)
    if size == "finetune":
        tensors = with_dense_experts(tensors)
    weight_map = {}
    for n, shard in enumerate(split(tensors)):
        name = f"model-{n:05d}-of-{SHARDS - 1:05d}.safetensors"  # zero-based, as published
        with (folder / name).open("wb") as file:
            file.write(safetensors_header(shard))
            for tensor, spec in shard.items():
                rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.encode())]))
                for piece in weights(tensor, spec, rng, config):
                    file.write(piece.data)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(spec.nbytes for spec in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    extra: dict[str, object] = {"eos_token_id": 200002, "pad_token_id": 199999}
    if size != "finetune":
        extra |= {"quantization_config": {"quant_method": "mxfp4"}}
    write_json(folder / "config.json", config.to_json() | extra)


def with_dense_experts(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The same tensors, with bfloat16 ones instead of MXFP4 blocks and scales."""
    return {
        name.removesuffix("_blocks"): dense_expert_spec(spec) if name.endswith("_blocks") else spec
        for name, spec in tensors.items()
        if not name.endswith("_scales")
    }


def split(tensors: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Shards of about equal size, in the order of the tensors."""
    total = sum(spec.nbytes for spec in tensors.values())
    shards: list[dict[str, TensorSpec]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, spec in tensors.items():
        shards[done * SHARDS // total][name] = spec
        done += spec.nbytes
    return shards


def weights(
    name: str, spec: TensorSpec, rng: np.random.Generator, config: ModelConfig
) -> Iterator[np.ndarray]:
    """The values of a tensor, in pieces: random bytes, looked up in a table of its distribution."""
    table = distribution(name, spec, rng, config)
    count = math.prod(spec.shape)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        if table is None:
            yield np.frombuffer(rng.bytes(size), np.uint8)
        else:
            yield table[np.frombuffer(rng.bytes(2 * size), np.uint16)]


def distribution(
    name: str, spec: TensorSpec, rng: np.random.Generator, config: ModelConfig
) -> np.ndarray | None:
    """65,536 samples to draw from, as stored: bfloat16 bits or scale bytes; None: any byte."""
    if name.endswith("_blocks"):
        return None
    if name.endswith("_scales"):
        inputs = config.hidden_size if "gate_up" in name else config.intermediate_size
        scale = spread(name.removesuffix("_scales"), WIDE) / math.sqrt(inputs) / E2M1_RMS
        jitter = rng.choice(np.array([-1, 0, 0, 0, 0, 0, 1]), 1 << 16)
        return (jitter + 127 + round(math.log2(scale))).astype(np.uint8)
    if name.endswith(tuple(WIDE)):
        inputs = spec.shape[1]  # of (out, in), and of (E, in, out)
        std = spread(name, WIDE) / math.sqrt(inputs)
    else:
        std = spread(name, NARROW)
    values = rng.standard_normal(1 << 16, dtype=np.float32) * np.float32(std)
    if name.endswith(ONE_CENTRED):
        values += 1
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def spread(name: str, table: Mapping[str, float]) -> float:
    """The entry for the end of a name."""
    return next(std for end, std in table.items() if name.endswith(end))


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=LAYERS, default="mini")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.folder, size=arguments.size, seed=arguments.seed)


if __name__ == "__main__":
    main()
