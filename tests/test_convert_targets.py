"""Targets that cannot be written, or only in part: one line says why, and nothing is lost."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import everything, refused
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint, pipeline, writing
from mlx_gptoss.errors import ConversionError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", layers=2)


def test_target_that_exists(source: Path) -> None:
    place = source.parent
    (place / "folder").mkdir()
    (place / "file").write_text("precious")
    (place / "link").symlink_to(place / "nowhere")
    for name in ("folder", "file", "link"):
        refused(source, f"{name}: already exists", ConversionError, name)
    assert (place / "link").is_symlink()


def test_target_and_source_in_each_other(source: Path) -> None:
    refused(source, "lies inside the source", ConversionError, "source/mlx")
    refused(source, "lies inside the source", ConversionError, "source")
    refused(source, "lies inside the source", ConversionError, "source/../source/mlx")
    outer = source.parent / "outer"
    outer.mkdir()
    inner = Path(shutil.move(source, outer / "source"))
    with pytest.raises(ConversionError, match="contains the source"):
        convert_checkpoint(inner, outer)
    (source.parent / "alias").symlink_to(inner)
    with pytest.raises(ConversionError, match="lies inside the source"):
        convert_checkpoint(inner, source.parent / "alias" / "mlx")


def test_target_without_a_parent(source: Path) -> None:
    refused(source, "no such folder; create it", ConversionError, "none/mlx")


def test_target_appears_during_the_conversion(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.parent / "mlx"
    real = pipeline.read_safetensors_header

    def appear(path: Path) -> Any:
        target.mkdir(exist_ok=True)
        (target / "theirs").write_text("precious")
        return real(path)

    monkeypatch.setattr(pipeline, "read_safetensors_header", appear)
    with pytest.raises(ConversionError, match="appeared while the conversion ran"):
        convert_checkpoint(source, target)
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert not (source.parent / ".mlx.converting").exists()


def test_too_little_space(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(source, "bytes are needed, 1,000,000 are free", ConversionError)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "mlx: the disk is full; free some space and convert again"),
        (errno.EDQUOT, "mlx: the disk is full; free some space and convert again"),
        (errno.EIO, "mlx: Input/output error; check the disk and convert again"),
    ],
)
def test_disk_fault_half_way(
    source: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    """The disk takes 1.5 MB, and part of the piece that no longer fits, as real ones do."""
    real, room = os.write, [1_500_000]

    def write(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(code, os.strerror(code))
        count = real(descriptor, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(writing.os, "write", write)
    refused(source, message, ConversionError)


def test_short_writes_are_completed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may write less than it was asked to, without an error."""
    whole = convert_checkpoint(source, source.parent / "whole").target
    real = os.write
    monkeypatch.setattr(writing.os, "write", lambda fd, data: real(fd, data[:100_000]))
    short = convert_checkpoint(source, source.parent / "short", verify=False).target
    assert everything(short).keys() == everything(whole).keys()
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (short / path.name).read_bytes()


def test_target_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(source, "cannot be created: Permission denied", ConversionError)


def test_two_conversions_into_one_target(source: Path) -> None:
    stage = source.parent / ".mlx.converting"
    stage.mkdir()
    with (stage / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(source, "another process is converting into it", ConversionError)


def test_a_foreign_folder_in_the_way(source: Path) -> None:
    stage = source.parent / ".mlx.converting"
    stage.mkdir()
    (stage / "thesis.txt").write_text("precious")
    refused(source, "holds thesis.txt, which no conversion left there", ConversionError)
