"""What a converted model folder holds: sizes by part, how each is stored, and whether it is intact.

Reads headers and JSON alone; only `check_hashes` reads the weights.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.checkpoint import Checkpoint
from mlx_gptoss.errors import CheckpointError, VerificationError

PIECE_BYTES = 4 << 20

# The first pattern found in a tensor's name says which part it belongs to.
PARTS = {
    ".mlp.experts.": "experts",
    ".self_attn.": "attention",
    "embed_tokens.": "embedding",
    "lm_head.": "unembedding",
    ".mlp.router.": "router",
    "norm.": "norms",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the weights.

    Attributes:
        nbytes: Size of its tensors.
        stored_as: The formats of its matrices: "mxfp4", "affine 8-bit in groups of 64", "bfloat16".
    """

    nbytes: int
    stored_as: tuple[str, ...]


def parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """The parts of a model, largest first."""
    nbytes: dict[str, int] = dict.fromkeys(PARTS.values(), 0)
    formats: dict[str, set[str]] = {name: set() for name in nbytes}
    for tensor, entry in checkpoint.tensors.items():
        part = part_of(tensor)
        nbytes[part] += entry.spec.nbytes
        if tensor.endswith(".weight"):
            formats[part].add(_format(checkpoint, tensor.removesuffix(".weight")))
    order = sorted(nbytes, key=lambda part: -nbytes[part])
    return {p: Part(nbytes=nbytes[p], stored_as=tuple(sorted(formats[p]))) for p in order}


def part_of(tensor: str) -> str:
    """The part that a tensor belongs to, by its converted name."""
    return next(part for pattern, part in PARTS.items() if pattern in tensor)


def _format(checkpoint: Checkpoint, module: str) -> str:
    packing = checkpoint.quantization_of(module)
    if packing is None:
        return "bfloat16"
    if packing.mode == "affine":
        return f"affine {packing.bits}-bit in groups of {packing.group_size}"
    return packing.mode


def check_hashes(
    checkpoint: Checkpoint, *, progress: Callable[[str, int, int], None] | None = None
) -> tuple[str, ...]:
    """Compare every file that the manifest lists with its sha256.

    Args:
        checkpoint: A folder that our converter wrote.
        progress: Called with (phase, bytes done, bytes in all).

    Returns:
        The names of the files, all intact.

    Raises:
        CheckpointError: There is no manifest.
        VerificationError: A file is missing or differs.
    """
    if checkpoint.manifest is None:
        raise CheckpointError(
            f"{checkpoint.folder}: no manifest with hashes, another tool wrote this folder; "
            "convert the source with `mlx-gptoss convert` to get one"
        )
    files = checkpoint.manifest["files"]
    done, total = 0, sum(entry["nbytes"] for entry in files.values())
    for name, entry in files.items():
        digest = hashlib.sha256()
        for piece in _pieces(checkpoint.folder / name):
            digest.update(piece)
            done += len(piece)
            if progress:
                progress("checking hashes", done, total)
        if digest.hexdigest() != entry["sha256"]:
            raise VerificationError(
                f"{checkpoint.folder / name}: expected sha256 {entry['sha256']}, got "
                f"{digest.hexdigest()}; the file has changed since the conversion: convert again"
            )
    return tuple(files)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise VerificationError(
            f"{path}: cannot be read: {error.strerror}; convert again"
        ) from error
