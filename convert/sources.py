"""Source checkpoints: which layout a folder holds, told by its contents and never guessed.

Names say whether a folder is in the Hugging Face or in the `original/` layout. Whether its experts
are MXFP4 is told by dtype and rank, not by name: U8 of rank 4 is MXFP4 blocks, BF16 of rank 3 is a
dense fine-tune, even under `*_blocks` names, where transformers 5 puts dense tensors when it saves
a dequantised model. Anything else is refused before a byte is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.checkpoint import check_tensors
from mlx_gptoss.config import ModelConfig, read_config
from mlx_gptoss.convert.names import Layout, Part, dense_expert_spec, parts, source_tensors
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.weight_files import TensorEntry, TensorSpec, read_json, read_tensors


@dataclass(frozen=True)
class Source:
    """A checked source checkpoint.

    `tensors` has one entry for every source name of `parts`; `dense_experts` says that the expert
    weights are bfloat16 `[E, in, out]`, listed under the name of the blocks that they stand for,
    and that there are no scales.
    """

    folder: Path
    layout: Layout
    dense_experts: bool
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    parts: Mapping[str, Part]

    @property
    def description(self) -> str:
        """The layout in words, for people and for the manifest."""
        experts = "bfloat16" if self.dense_experts else "MXFP4"
        return f"{self.layout.value}, {experts} experts"

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(entry.spec.nbytes for entry in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The weight files that are read."""
        return sorted({entry.path for entry in self.tensors.values()})


def open_source(folder: Path) -> Source:
    """Find out what a folder holds, and check names, shapes and dtypes of all its tensors.

    Raises:
        ConfigError: config.json is missing or of another model.
        CheckpointError: A file, the index or a tensor is missing, damaged or of another model.
        ConversionError: The folder is none, or needs no conversion, or cannot be converted.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder}: not a folder; expected a downloaded checkpoint")
    if (folder / "original" / "config.json").exists() and not (folder / "config.json").exists():
        raise ConversionError(f"{folder}: no config.json; convert {folder / 'original'} instead")
    config, _ = read_config(folder)
    _check_method(folder)
    tensors = read_tensors(folder)
    layout = _layout(folder, tensors)
    specs = source_tensors(config, layout)
    dense, renamed = _find_dense_experts(tensors, specs)
    if dense:
        specs = {n: s for n, s in specs.items() if not n.endswith("_scales")}
        specs |= {n: dense_expert_spec(s) for n, s in specs.items() if n.endswith("_blocks")}
    check_tensors(renamed, specs, folder)
    return Source(folder, layout, dense, config, renamed, parts(config, layout))


def _check_method(folder: Path) -> None:
    """Only MXFP4 is repacked; the packings of other libraries have other tensors."""
    block = read_json(folder / "config.json").get("quantization_config")
    method = block.get("quant_method", "mxfp4") if isinstance(block, dict) else "mxfp4"
    if method != "mxfp4":
        raise ConversionError(
            f"{folder / 'config.json'}: quantization_config.quant_method: expected 'mxfp4', got "
            f"{method!r}; convert the unquantised checkpoint instead"
        )


def _layout(folder: Path, tensors: Mapping[str, TensorEntry]) -> Layout:
    if any(".experts.gate_proj." in name for name in tensors):
        raise ConversionError(
            f"{folder}: already in the converted format; open it as it is, for example with "
            f"`mlx-gptoss generate -m {folder}`"
        )
    if any(name.startswith("block.") for name in tensors):
        return Layout.ORIGINAL
    return Layout.HUGGING_FACE


def _find_dense_experts(
    tensors: Mapping[str, TensorEntry], specs: Mapping[str, TensorSpec]
) -> tuple[bool, dict[str, TensorEntry]]:
    """Whether the experts are bfloat16 of rank 3, and the tensors with those under blocks' names.

    One dense expert tensor makes the checkpoint dense: a mixture then fails the shape check, which
    names the tensor that differs.
    """
    renamed = dict(tensors)
    dense = False
    for blocks in [name for name in specs if name.endswith("_blocks")]:
        for name in (blocks, blocks.removesuffix("_blocks")):
            entry = tensors.get(name)
            if entry is not None and entry.dtype == "BF16" and len(entry.shape) == 3:
                dense = True
                renamed[blocks] = renamed.pop(name)
                break
    return dense, renamed
