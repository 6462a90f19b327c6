"""The embedded demo model: from 3 MB in the package to a checkpoint like the published ones.

The compact file holds every tensor of a small gpt-oss, but only the rows of the vocabulary that it
was trained on, and one row more, which stands for every other token. `expand_demo` writes the
published Hugging Face layout from it, the same bytes on every machine; the ordinary converter does
the rest. How the model was made, and how well it answers, is in `benchmarks/demo_model`.
"""

import errno
import fcntl
import hashlib
import json
import lzma
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import CheckpointError, ConversionError, GptOssError
from mlx_gptoss.manifest import MANIFEST, read_manifest
from mlx_gptoss.vocabulary import N_VOCAB
from mlx_gptoss.weight_files import INDEX, TensorSpec, safetensors_header

DEMO_SHA256 = "4f27c73da760c3071f9ff2fdd7c1baa241310866df7e150b690d46b00d286bbd"
"""Hash of the compact file as it is shipped."""

SPARE_BYTES = 300 << 20  # two expanded copies of 105 MB during conversion, and room to breathe
ROWS_AT_ONCE = 16_384  # bounds the memory of an expansion to a few MB
TOKEN_IDS = "token_ids"
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"uint8": "U8", "uint16": "BF16"}  # numpy has no bfloat16: its bits travel as uint16

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": 199999,
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
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": N_VOCAB,
}
GENERATION_CONFIG = {
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],
    "pad_token_id": 199999,
    "transformers_version": "4.55.0.dev0",
}


def demo_model_path(store: Path) -> Path:
    """The converted demo model in a model store, made at first use (a second or two).

    Safe when several processes ask at once. What a kill leaves, or a copy whose files are missing
    or of another size, is replaced; demos of other versions are then removed.

    Args:
        store: Folder of models; created if it is not there.

    Returns:
        A folder in `store` that `load_model` opens, named after the compact file's hash.

    Raises:
        CheckpointError: The compact file is missing or damaged.
        ConversionError: The store cannot be written, its disk is full, or a file that is not the
            demo's lies in a damaged copy.
    """
    target = _folder(store)
    if is_unpacked(store):
        return target
    source = store / f".{target.name}.source"
    with _store_faults(store):
        store.mkdir(parents=True, exist_ok=True)
        with (store / ".demo.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_unpacked(store):  # made by another process while this one waited
                return target
            _check_space(store)
            if target.is_dir() and not _remove(target):
                raise ConversionError(
                    f"{target}: this copy of the demo model is damaged, and holds files that are "
                    "not its own; move them away, so that it can be made anew"
                )
            shutil.rmtree(source, ignore_errors=True)
            try:
                expand_demo(source)
                convert_checkpoint(source, target)
            finally:
                shutil.rmtree(source, ignore_errors=True)
            for other in store.glob("demo-" + 12 * "[0-9a-f]"):
                if other != target:
                    _remove(other)
    return target


def is_unpacked(store: Path) -> bool:
    """Whether a model store holds the demo with every file that its manifest names, in full."""
    folder = _folder(store)
    try:
        manifest = read_manifest(folder)
        return manifest is not None and all(
            (folder / name).stat().st_size == entry["nbytes"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, GptOssError):
        return False


def _folder(store: Path) -> Path:
    return store / f"demo-{DEMO_SHA256[:12]}"


def _remove(folder: Path) -> bool:
    """Remove an unpacked demo, unless a file lies in it that no conversion writes."""
    if not all(_CONVERTED.fullmatch(path.name) for path in folder.iterdir()):
        return False
    shutil.rmtree(folder)
    return True


_CONVERTED = re.compile(
    rf"{re.escape(MANIFEST)}|(generation_)?config\.json|model[-.\w]*\.safetensors(\.index\.json)?"
)


def expand_demo(folder: Path) -> None:
    """Write the demo model as a checkpoint in the published Hugging Face layout.

    Args:
        folder: To be made; its parent exists.

    Raises:
        CheckpointError: The compact file is missing or damaged.
        OSError: The folder exists already, or cannot be written.
    """
    tensors = read_compact()
    folder.mkdir()
    names = [name for name in tensors if name not in (TOKEN_IDS, EMBEDDING, UNEMBEDDING)]
    shards = [[EMBEDDING], sorted(names), [UNEMBEDDING]]
    weight_map, total_bytes = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        specs = {name: _published_spec(name, tensors[name]) for name in shard}
        with (folder / file).open("wb") as out:
            out.write(safetensors_header(specs))
            for name in shard:
                for piece in _pieces(name, tensors):
                    out.write(piece.data)
        weight_map |= dict.fromkeys(shard, file)
        total_bytes += sum(spec.nbytes for spec in specs.values())
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    small = {"config.json": CONFIG, "generation_config.json": GENERATION_CONFIG, INDEX: index}
    for name, value in small.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def read_compact() -> dict[str, np.ndarray]:
    """The tensors of the compact file; bfloat16 as uint16.

    `token_ids` (N) int32 ascending names the tokens of the first N rows of the embedding and the
    unembedding; their last row, number N, is that of all other tokens.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    source = files("mlx_gptoss") / "data" / "demo.safetensors.xz"
    try:
        packed = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}; {_REINSTALL}") from None
    found = hashlib.sha256(packed).hexdigest()
    if found != DEMO_SHA256:
        raise CheckpointError(f"{source}: expected sha256 {DEMO_SHA256}, got {found}; {_REINSTALL}")
    return load(lzma.decompress(packed))


_REINSTALL = "the installed package is damaged: reinstall mlx-gptoss"


def _published_spec(name: str, array: np.ndarray) -> TensorSpec:
    shape = (N_VOCAB, array.shape[1]) if name in (EMBEDDING, UNEMBEDDING) else array.shape
    return TensorSpec(shape, DTYPES[array.dtype.name])


def _pieces(name: str, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The bytes of a published tensor, in order."""
    array = tensors[name]
    if name not in (EMBEDDING, UNEMBEDDING):
        yield array
        return
    token_ids = tensors[TOKEN_IDS]
    row_of = np.full(N_VOCAB, len(token_ids))
    row_of[token_ids] = np.arange(len(token_ids))
    for start in range(0, N_VOCAB, ROWS_AT_ONCE):
        yield array[row_of[start : start + ROWS_AT_ONCE]]


def _check_space(store: Path) -> None:
    free = shutil.disk_usage(store).free
    if free < SPARE_BYTES:
        raise ConversionError(
            f"{store}: the demo model needs {SPARE_BYTES:,} bytes, {free:,} are free; free some "
            "space, or set MLX_GPTOSS_HOME to a folder on another disk"
        )


@contextmanager
def _store_faults(store: Path) -> Iterator[None]:
    """Faults of the store's file system as one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
        raise ConversionError(
            f"{store}: {what}; the demo model is unpacked there: free some space or give access, "
            "or set MLX_GPTOSS_HOME to another folder"
        ) from None
