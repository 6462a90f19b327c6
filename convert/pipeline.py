"""The conversion itself: check, plan, cut, write, prove, publish.

Everything that can be checked is checked before the first byte is written; the target appears by
one rename after the proof. One file a layer: the unit that a kill can cost, and small enough that
its tensors' hashes fit a journal. No step needs MLX, and none holds a tensor in memory.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mlx_gptoss._version import __version__
from mlx_gptoss.checkpoint import (
    DENSE_GROUP,
    MXFP4,
    Quantization,
    converted_quantization,
    expected_tensors,
    linear_modules,
)
from mlx_gptoss.convert.output import (
    COPIED,
    Files,
    converted_config,
    data_bytes,
    index,
    json_text,
    manifest,
    plan_files,
)
from mlx_gptoss.convert.reading import Cutter, SourceReader
from mlx_gptoss.convert.sources import Source, open_source
from mlx_gptoss.convert.staging import Staging, clear_leftovers, staging
from mlx_gptoss.convert.verify import KindError, verify_conversion
from mlx_gptoss.convert.writing import WrittenFile, settle_file, write_file
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.manifest import MANIFEST, MANIFEST_VERSION
from mlx_gptoss.vocabulary import check_tokenizer_json
from mlx_gptoss.weight_files import (
    INDEX,
    read_safetensors_header,
    safetensors_header,
)

Dense = Literal["bf16", "q8", "q4"]
Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all

SPARE_BYTES = 64 << 20  # left free beside the weights: small files, the file system's own needs


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did: sizes in bytes, times in seconds, and the errors that it proved.

    `errors` is None where verification was switched off.
    """

    target: Path
    source: str
    dense: Dense
    weight_bytes: int
    resumed_bytes: int
    convert_s: float
    verify_s: float
    errors: tuple[KindError, ...] | None


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    dense: Dense = "bf16",
    verify: bool = True,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a published or fine-tuned checkpoint into the format that the runtime loads.

    Peak memory is a few pieces of 8 MiB (and one expert's matrix for dense experts), whatever the
    size of the checkpoint. A conversion that was killed goes on where it stopped when it is started
    again with the same arguments.

    Args:
        source: Folder in the Hugging Face or `original/` layout, experts MXFP4 or bfloat16.
        target: Folder to be made; its parent must exist, it must not.
        dense: "bf16" keeps attention, embedding and unembedding as they are; "q8" and "q4" store
            them as MLX's affine quantization in groups of 64.
        verify: Re-read the result and compare every weight with the source before publishing it.
        progress: Told after each piece: "converting" or "verifying", bytes done, bytes in all.

    Returns:
        Sizes, times and proven errors.

    Raises:
        ConversionError: The paths, the free space or a file system fault forbid it.
        ConfigError: config.json is missing or of another model.
        CheckpointError: A weight file is missing, damaged, or of another model.
        VocabularyError: The folder holds another model's tokenizer.
        VerificationError: The result differs from the source.
    """
    if dense not in get_args(Dense):
        raise ValueError(f"dense: expected one of {', '.join(get_args(Dense))}, got {dense!r}")
    folder, target = _check_paths(Path(source), Path(target))
    checkpoint = open_source(folder)
    if (folder / "tokenizer.json").exists():
        check_tokenizer_json(folder / "tokenizer.json")
    quantization = _quantization(checkpoint, dense)
    files = plan_files(expected_tensors(checkpoint.config, quantization))
    with _file_system_faults(target), staging(target, _job(checkpoint, dense)) as stage:
        _check_space(stage, files, target)
        writing = _Phase("converting", data_bytes(files), progress)
        _write_weights(checkpoint, quantization, files, stage, writing)
        record = _write_small_files(checkpoint, quantization, files, stage, dense)
        proving = _Phase("verifying", checkpoint.nbytes, progress)
        errors = _verify(checkpoint, quantization, files, stage, proving) if verify else None
        record["verified"] = None if errors is None else [asdict(e) for e in errors]
        _write_durably(stage.files / MANIFEST, json_text(record))
        stage.publish(target)
    return ConversionReport(
        target=target,
        source=checkpoint.description,
        dense=dense,
        weight_bytes=data_bytes(files),
        resumed_bytes=writing.resumed_bytes,
        convert_s=writing.seconds,
        verify_s=proving.seconds,
        errors=errors,
    )


class _Phase:
    """Counts the bytes of a phase, and its time from the first byte to the last."""

    def __init__(self, name: str, total_bytes: int, progress: Progress | None) -> None:
        self._name, self._total, self._progress = name, total_bytes, progress
        self._began = time.monotonic()
        self._done = self.resumed_bytes = 0
        self.seconds = 0.0

    def resume(self, nbytes: int) -> None:
        """Count bytes that an earlier run has done."""
        self.resumed_bytes = nbytes
        self._began = time.monotonic()
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        """Count bytes that this run has done."""
        self._done += nbytes
        self.seconds = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(self._name, self._done, self._total)


def _check_paths(source: Path, target: Path) -> tuple[Path, Path]:
    """Both paths, absolute, or an error if the target's place is not free."""
    source = source.resolve()
    target = target.parent.resolve() / target.name
    if target == source or source in target.parents:
        raise ConversionError(f"{target}: lies inside the source {source}; choose another target")
    if target in source.parents:
        raise ConversionError(f"{target}: contains the source {source}; choose another target")
    if not target.name or not target.parent.is_dir():
        raise ConversionError(f"{target.parent}: no such folder; create it, then convert again")
    if os.path.lexists(target):
        clear_leftovers(target)
        raise ConversionError(f"{target}: already exists; remove it or choose another target")
    return source, target


def _quantization(source: Source, dense: Dense) -> dict[str, Quantization]:
    """Packing of every module, where the columns allow it."""
    packed = converted_quantization(source.config, dense)
    for module, shape in linear_modules(source.config).items():
        if module in packed and packed[module] != MXFP4 and shape[-1] % DENSE_GROUP:
            raise ConversionError(
                f"{source.folder}: {module}: {shape[-1]} columns are no multiple of {DENSE_GROUP}, "
                f"which {dense} needs; convert with bf16"
            )
    return packed


def _job(source: Source, dense: Dense) -> dict[str, Any]:
    """Everything that the weights depend on: a staged conversion goes on only if this is equal."""
    config = (source.folder / "config.json").read_bytes()
    stats = [(path.name, path.stat()) for path in source.files]
    return {
        "manifest": MANIFEST_VERSION,
        "package": __version__,
        "dense": dense,
        "config": hashlib.sha256(config).hexdigest(),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _check_space(stage: Staging, files: Files, target: Path) -> None:
    """Refuse to start what cannot end, counting only what is still to be written."""
    missing = {name: tensors for name, tensors in files.items() if name not in stage.done}
    needed = data_bytes(missing) + sum(len(safetensors_header(t)) for t in missing.values())
    free = shutil.disk_usage(target.parent).free
    if free < needed + SPARE_BYTES:
        raise ConversionError(
            f"{target.parent}: {needed + SPARE_BYTES:,} bytes are needed, {free:,} are free; "
            "free some space or choose another disk"
        )


def _write_weights(
    source: Source,
    quantization: Mapping[str, Quantization],
    files: Files,
    stage: Staging,
    phase: _Phase,
) -> None:
    """Write what is missing; the disk settles a file while the next one is cut and hashed."""
    phase.resume(data_bytes({name: files[name] for name in stage.done}))
    missing = [name for name in files if name not in stage.done]
    with SourceReader() as reader, ThreadPoolExecutor(1) as settling:
        cutter = Cutter(source, quantization, reader)
        settled: Future[None] | None = None
        for name in missing:
            path = stage.files / name
            written = write_file(path, files[name], cutter.pieces, written=phase.add)
            if settled is not None:
                settled.result()
            settled = settling.submit(_settle, stage, name, written)
        if settled is not None:
            settled.result()
    phase.add(0)


def _settle(stage: Staging, name: str, written: WrittenFile) -> None:
    settle_file(stage.files / name)
    stage.finish(name, written)


def _write_small_files(
    source: Source,
    quantization: Mapping[str, Quantization],
    files: Files,
    stage: Staging,
    dense: Dense,
) -> dict[str, Any]:
    """Write config, index and tokenizer; return the manifest, which names them all."""
    small = {
        "config.json": json_text(converted_config(source, quantization)),
        INDEX: json_text(index(files)),
    }
    for name in COPIED:
        if (source.folder / name).is_file():
            small[name] = (source.folder / name).read_bytes()
    digests = {}
    for name, data in small.items():
        _write_durably(stage.files / name, data)
        digests[name] = WrittenFile(len(data), hashlib.sha256(data).hexdigest(), {})
    return manifest(source, dense, {**digests, **{name: stage.done[name] for name in files}})


def _verify(
    source: Source,
    quantization: Mapping[str, Quantization],
    files: Files,
    stage: Staging,
    phase: _Phase,
) -> tuple[KindError, ...]:
    phase.resume(0)
    tensors = {}
    for name in files:
        tensors |= read_safetensors_header(stage.files / name)
    return tuple(verify_conversion(source, tensors, quantization, compared=phase.add))


@contextmanager
def _file_system_faults(target: Path):
    """Faults of the disk as one line; by then the staging folder is gone."""
    try:
        yield
    except OSError as error:
        what = (
            "the disk is full; free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else f"{error.strerror or error}; check the disk"
        )
        raise ConversionError(f"{target}: {what} and convert again; nothing was left") from error


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
