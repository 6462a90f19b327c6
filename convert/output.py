"""What a converted folder holds beside its weights: config, index, manifest, and copied files."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mlx_gptoss._version import __version__
from mlx_gptoss.checkpoint import MXFP4, Quantization
from mlx_gptoss.convert.sources import Source
from mlx_gptoss.convert.writing import WrittenFile
from mlx_gptoss.manifest import MANIFEST_VERSION
from mlx_gptoss.weight_files import TensorSpec, read_json

Files = dict[str, dict[str, TensorSpec]]  # file name to its tensors, both in order

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "USAGE_POLICY",
)


def plan_files(tensors: Mapping[str, TensorSpec]) -> Files:
    """Divide the tensors among files: the embedding, each layer, and the rest."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in tensors.items():
        words = name.split(".")
        group = words[2] if words[1] == "layers" else words[1] if words[0] == "model" else words[0]
        groups.setdefault("lm_head" if group == "norm" else group, {})[name] = spec
    return {
        f"model-{n:05d}-of-{len(groups):05d}.safetensors": group
        for n, group in enumerate(groups.values(), 1)
    }


def converted_config(source: Source, quantization: Mapping[str, Quantization]) -> dict[str, Any]:
    """config.json as mlx-lm writes and reads it: one default packing, and the modules that differ.

    The model's own fields are written in the spelling that every MLX tool knows; what else the
    source's config says (token ids, names) is kept.
    """
    config = source.config.to_json()
    raw = read_json(source.folder / "config.json")
    spellings = {"rope_parameters", "num_experts", "quantization", "quantization_config"}
    if raw.get("model_type") == "gpt_oss":
        config = {k: v for k, v in raw.items() if k not in spellings} | config
    packing: dict[str, Any] = asdict(MXFP4)
    packing |= {m: asdict(q) for m, q in quantization.items() if q != MXFP4}
    return config | {"quantization": packing, "quantization_config": packing}


def index(files: Files) -> dict[str, Any]:
    """The index of the weight files, as mlx-lm and transformers write it."""
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    metadata = {"total_size": data_bytes(files)}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def manifest(source: Source, dense: str, written: Mapping[str, WrittenFile]) -> dict[str, Any]:
    """The manifest, less the result of the verification."""
    folder = source.folder
    return {
        "version": MANIFEST_VERSION,
        "converter": f"mlx-gptoss {__version__}",
        "source": {
            "folder": folder.name,
            "revision": folder.name if folder.parent.name == "snapshots" else None,
            "layout": source.description,
            "files": {path.name: path.stat().st_size for path in source.files},
        },
        "options": {"dense": dense},
        "files": {
            name: {"nbytes": file.nbytes, "sha256": file.sha256}
            for name, file in sorted(written.items())
        },
        "tensors": {
            name: digest
            for _, file in sorted(written.items())
            for name, digest in file.tensors.items()
        },
    }


def json_text(value: Any) -> bytes:
    """A JSON file, indented as people read it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def data_bytes(files: Files) -> int:
    """Size of all tensors, headers not counted."""
    return sum(spec.nbytes for tensors in files.values() for spec in tensors.values())
