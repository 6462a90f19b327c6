"""The hidden folder beside the target in which a conversion grows, survives a kill, and is resumed.

    .NAME.converting/lock      held while a process converts into NAME
    .NAME.converting/journal   line 1: what is converted, how; then a line for each finished file
    .NAME.converting/files/    becomes NAME, by one rename, when everything is there and proven

A file enters the journal after it is durable under its own name, so whatever the journal lists is
complete at any moment of a kill or a power cut. Errors remove the folder; only a kill, or Ctrl-C,
leaves it, and the same conversion then goes on after the last finished file.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.convert.writing import WrittenFile
from mlx_gptoss.errors import ConversionError


@dataclass(frozen=True)
class Staging:
    """An open staging folder: where files are written, and those that are finished."""

    folder: Path
    done: dict[str, WrittenFile]

    @property
    def files(self) -> Path:
        """The folder that becomes the target."""
        return self.folder / "files"

    def finish(self, name: str, written: WrittenFile) -> None:
        """Note that a file is complete and durable."""
        self.done[name] = written
        self._append({"name": name, **asdict(written)})

    def publish(self, target: Path) -> None:
        """Give the finished folder its name.

        Raises:
            ConversionError: Something of that name has appeared in the meantime.
        """
        try:
            os.rename(self.files, target)
        except OSError as error:
            raise ConversionError(
                f"{target}: appeared while the conversion ran ({error.strerror}); "
                "remove it and convert again"
            ) from None
        _sync_folder(target.parent)

    def _append(self, entry: dict[str, Any]) -> None:
        _sync_folder(self.files)
        with (self.folder / "journal").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


@contextmanager
def staging(target: Path, job: dict[str, Any]) -> Iterator[Staging]:
    """Open the staging folder of a target, and resume in it if it holds the same job.

    Args:
        target: The folder to be made; its parent exists.
        job: Everything that determines the result, as JSON. Another job starts from nothing.

    Raises:
        ConversionError: Another process converts into the same target, or the folder's name is
            taken by something that is not ours.
    """
    folder = _folder(target)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be created: {error.strerror}") from None
    _refuse_foreign(folder)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{target}: another process is converting into it; wait for it to end"
            ) from None
        try:
            yield _resume(folder, job)
        except KeyboardInterrupt:
            raise  # what is done stays, as after a kill
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)  # the target is there: nothing can fail now


def clear_leftovers(target: Path) -> None:
    """Remove the staging folder of a finished target, left by a kill just after the rename."""
    folder = _folder(target)
    if folder.is_dir() and not (folder / "files").exists():
        _refuse_foreign(folder)
        shutil.rmtree(folder)


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.converting")


def _refuse_foreign(folder: Path) -> None:
    foreign = {path.name for path in folder.iterdir()} - {"lock", "journal", "files"}
    if foreign:
        raise ConversionError(
            f"{folder}: holds {sorted(foreign)[0]}, which no conversion left there; move it away"
        )


def _resume(folder: Path, job: dict[str, Any]) -> Staging:
    """Keep the finished files of the same job, and remove everything else."""
    entries = _read_journal(folder / "journal")
    stage = Staging(folder, {})
    if entries[:1] != [job]:
        shutil.rmtree(stage.files, ignore_errors=True)
        (folder / "journal").unlink(missing_ok=True)
        stage.files.mkdir()
        stage._append(job)
        return stage
    stage.files.mkdir(exist_ok=True)
    for entry in entries[1:]:
        name = entry.pop("name")
        path = stage.files / name
        if path.exists() and path.stat().st_size == entry["nbytes"]:
            stage.done[name] = WrittenFile(**entry)
    for path in stage.files.iterdir():
        if path.name not in stage.done:
            path.unlink()
    return stage


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a kill may have torn the last one."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
