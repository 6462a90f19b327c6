"""A checkpoint that the runtime can load: which tensors it has, how each is stored, and where.

The converted format is mlx-lm's: its tensor names, its `quantization` dictionary in config.json,
its sharded safetensors. So folders written by mlx-lm open here too, and ours open there. Beside
them our converter leaves `mlx_gptoss.json`, the manifest: format version, source, options, and the
sha256 of every file and tensor.

Names and shapes are derived from `ModelConfig`, never from the files, and everything is compared
before anything is loaded. Importing MLX waits until `Checkpoint.load`, so the converter needs none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gptoss.config import ModelConfig, read_config
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.manifest import read_manifest
from mlx_gptoss.weight_files import (
    TensorEntry,
    TensorSpec,
    read_json,
    read_safetensors_header,
    read_tensors,
)

if TYPE_CHECKING:
    import mlx.core as mx

DENSE_GROUP = 64  # columns of one scale where the converter packs dense weights
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)

__all__ = [
    "MXFP4",
    "Checkpoint",
    "Quantization",
    "TensorEntry",
    "TensorSpec",
    "converted_quantization",
    "expected_tensors",
    "linear_modules",
    "open_checkpoint",
    "read_safetensors_header",
    "read_tensors",
]


@dataclass(frozen=True)
class Quantization:
    """How MLX packed a weight: `mode` is "mxfp4" (group 32, 4 bits) or "affine"."""

    group_size: int
    bits: int
    mode: str


MXFP4 = Quantization(32, 4, "mxfp4")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose names, shapes and dtypes have been checked against its config.

    `quantization` maps module paths ("lm_head") to how they are packed; a module that is absent
    is dense bfloat16. `manifest` is None for a folder that our converter did not write.
    """

    folder: Path
    config: ModelConfig
    quantization: Mapping[str, Quantization]
    tensors: Mapping[str, TensorEntry]
    manifest: Mapping[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(entry.spec.nbytes for entry in self.tensors.values())

    def quantization_of(self, module: str) -> Quantization | None:
        """How a module's weight is packed; None where it is dense."""
        return self.quantization.get(module)

    def load(self) -> "dict[str, mx.array]":
        """All tensors, by name, as lazy arrays: MLX reads each when it is first evaluated.

        Returns:
            Arrays with the shapes of `expected_tensors`; U32, U8 or bfloat16.

        Raises:
            CheckpointError: MLX cannot open a file.
        """
        import mlx.core as mx

        arrays: dict[str, mx.array] = {}
        for path in sorted({entry.path for entry in self.tensors.values()}):
            try:
                loaded = mx.load(str(path))
            except (OSError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"{path}: MLX cannot load it: {error}") from None
            assert isinstance(loaded, dict)
            arrays |= {k: v for k, v in loaded.items() if self.tensors[k].path == path}
        return arrays


def linear_modules(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every module with a matrix, and its dense shape: (rows, columns), experts (E, rows, columns).

    These are the modules that a `quantization` dictionary may name.
    """
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    hidden, inter, experts = c.hidden_size, c.intermediate_size, c.num_local_experts
    modules: dict[str, tuple[int, ...]] = {"model.embed_tokens": (c.vocab_size, hidden)}
    for n in range(c.num_hidden_layers):
        modules |= {
            f"model.layers.{n}.self_attn.q_proj": (q, hidden),
            f"model.layers.{n}.self_attn.k_proj": (kv, hidden),
            f"model.layers.{n}.self_attn.v_proj": (kv, hidden),
            f"model.layers.{n}.self_attn.o_proj": (hidden, q),
            f"model.layers.{n}.mlp.router": (experts, hidden),
            f"model.layers.{n}.mlp.experts.gate_proj": (experts, inter, hidden),
            f"model.layers.{n}.mlp.experts.up_proj": (experts, inter, hidden),
            f"model.layers.{n}.mlp.experts.down_proj": (experts, hidden, inter),
        }
    modules["lm_head"] = (c.vocab_size, hidden)
    return modules


def converted_quantization(config: ModelConfig, dense: str) -> dict[str, Quantization]:
    """How the converter packs every module: experts MXFP4, routers never, the rest as asked.

    Args:
        config: Sizes of the model.
        dense: "bf16", "q8" or "q4".

    Returns:
        Module path to packing, as `expected_tensors` takes it.
    """
    packed: dict[str, Quantization] = {}
    for module in linear_modules(config):
        if ".experts." in module:
            packed[module] = MXFP4
        elif dense != "bf16" and not module.endswith(".router"):
            packed[module] = Quantization(DENSE_GROUP, int(dense[1:]), "affine")
    return packed


def expected_tensors(
    config: ModelConfig, quantization: Mapping[str, Quantization]
) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a converted checkpoint, in the order of the layers.

    Args:
        config: Sizes of the model.
        quantization: Module path to packing; a module that is absent is dense.

    Returns:
        Tensor name to spec: packed weights U32, MXFP4 scales U8, everything else BF16.
    """
    tensors: dict[str, TensorSpec] = {}
    for module, shape in linear_modules(config).items():
        tensors |= _module_tensors(module, shape, quantization.get(module))
        if module not in ("model.embed_tokens", "lm_head"):
            tensors[f"{module}.bias"] = TensorSpec(shape[:-1], "BF16")
    hidden = TensorSpec((config.hidden_size,), "BF16")
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        tensors[f"{layer}.input_layernorm.weight"] = hidden
        tensors[f"{layer}.post_attention_layernorm.weight"] = hidden
        tensors[f"{layer}.self_attn.sinks"] = TensorSpec((config.num_attention_heads,), "BF16")
    tensors["model.norm.weight"] = hidden
    return tensors


def _module_tensors(
    module: str, shape: tuple[int, ...], packing: Quantization | None
) -> dict[str, TensorSpec]:
    if packing is None:
        return {f"{module}.weight": TensorSpec(shape, "BF16")}
    *rows, columns = shape
    packed = TensorSpec((*rows, columns * packing.bits // 32), "U32")
    groups = (*rows, columns // packing.group_size)
    if packing.mode == "mxfp4":
        return {f"{module}.weight": packed, f"{module}.scales": TensorSpec(groups, "U8")}
    return {
        f"{module}.weight": packed,
        f"{module}.scales": TensorSpec(groups, "BF16"),
        f"{module}.biases": TensorSpec(groups, "BF16"),
    }


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a converted folder, ours or mlx-lm's, and check everything but the weights' values.

    Args:
        folder: A folder with config.json, safetensors files and (if several) their index.

    Returns:
        The checked checkpoint.

    Raises:
        ConfigError: config.json is missing or of another model.
        CheckpointError: The folder is no checkpoint, is in a source layout, or a tensor is
            missing, unknown, or of another shape or dtype.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected one with config.json and weights")
    config, _ = read_config(folder)
    manifest = read_manifest(folder)
    tensors = read_tensors(folder)
    _refuse_source_layout(folder, tensors)
    quantization = _read_quantization(folder, config, tensors)
    check_tensors(tensors, expected_tensors(config, quantization), folder)
    return Checkpoint(folder, config, quantization, tensors, manifest)


def check_tensors(
    found: Mapping[str, TensorEntry], expected: Mapping[str, TensorSpec], folder: Path
) -> None:
    """Compare names, shapes and dtypes.

    Raises:
        CheckpointError: Names the first tensor that is missing, unknown, or different.
    """
    for name, spec in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder}: {name} is missing, expected {spec}")
        if found[name].spec != spec:
            raise CheckpointError(
                f"{found[name].path}: {name}: expected {spec}, got {found[name].spec}; "
                "the weights are damaged or do not belong to this config.json"
            )
    for name in sorted(set(found) - set(expected)):
        raise CheckpointError(
            f"{found[name].path}: {name}: no such tensor in this model, got {found[name].spec}; "
            "the weights do not belong to this config.json"
        )


def _refuse_source_layout(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    if any(n.startswith("block.") or ".experts.gate_up_proj" in n for n in tensors):
        raise CheckpointError(
            f"{folder}: a source checkpoint, not yet converted; "
            f"run `mlx-gptoss convert {folder} TARGET` and open TARGET"
        )


def _read_quantization(
    folder: Path, config: ModelConfig, tensors: Mapping[str, TensorEntry]
) -> dict[str, Quantization]:
    """Module path to packing: from config.json where it names the module, else from the shapes.

    mlx-lm names only the modules that differ from its default, and infers the rest likewise.
    """
    path = folder / "config.json"
    raw = read_json(path)
    stated = raw.get("quantization", raw.get("quantization_config"))
    stated = {} if stated is None else stated
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: quantization: expected a JSON object, got {stated!r}")
    found: dict[str, Quantization] = {}
    for module, shape in linear_modules(config).items():
        if isinstance(entry := stated.get(module), dict):
            found[module] = _checked(entry, module, shape[-1], path)
        elif f"{module}.scales" in tensors:
            entry = _inferred(module, shape[-1], tensors)
            found[module] = _checked(entry, module, shape[-1], path)
    return found


def _inferred(
    module: str, columns: int, tensors: Mapping[str, TensorEntry]
) -> dict[str, int | str]:
    """What the scales say: bytes are MXFP4's, and affine ones count the groups and the bits."""
    scales = tensors[f"{module}.scales"]
    if scales.dtype == "U8":
        return {"group_size": MXFP4.group_size, "bits": MXFP4.bits, "mode": MXFP4.mode}
    weight = tensors.get(f"{module}.weight")
    if weight is None or not weight.shape or not scales.shape or not scales.shape[-1]:
        raise CheckpointError(f"{scales.path}: {module}.scales has no weight to scale")
    return {
        "group_size": columns // scales.shape[-1],
        "bits": weight.shape[-1] * 32 // columns,
        "mode": "affine",
    }


def _checked(entry: Mapping[str, Any], module: str, columns: int, path: Path) -> Quantization:
    """A packing that this package computes with, or an error that names the module."""
    packing = Quantization(
        entry.get("group_size", 64), entry.get("bits", 4), entry.get("mode", "affine")
    )
    affine = packing.mode == "affine" and (
        packing.bits in AFFINE_BITS and packing.group_size in AFFINE_GROUPS
    )
    if not (affine or packing == MXFP4) or columns % packing.group_size:
        raise CheckpointError(
            f"{path}: {module}: expected MXFP4 or affine quantization in groups that divide "
            f"{columns} columns, got {dict(entry)}; run `mlx-gptoss convert` on the source instead"
        )
    return packing
