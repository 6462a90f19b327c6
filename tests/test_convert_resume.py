"""A conversion killed at any moment goes on where it stopped, and ends in the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import TinyShape, write_checkpoint

from mlx_gptoss.convert import convert_checkpoint, pipeline, staging
from mlx_gptoss.errors import ConversionError

KILLS = 20
ROOT = Path(__file__).resolve().parent.parent
CODE = (
    "import sys; from mlx_gptoss.convert import convert_checkpoint; "
    "import mlx_gptoss.convert.pipeline; print('ready', flush=True); "
    "convert_checkpoint(sys.argv[1], sys.argv[2], dense='q4'); print('done', flush=True)"
)


def hashes(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mlx_gptoss.json").read_text())


def start(source: Path, target: Path) -> "subprocess.Popen[str]":
    """A conversion in a process of its own, from the moment that it begins to work."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(source), str(target)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Kills are spread over the time that a whole conversion takes, proof and rename included."""
    shape = TinyShape(layers=6, vocab=4096, experts=24)
    source = write_checkpoint(tmp_path / "source", shape=shape)
    convert_checkpoint(source, tmp_path / "whole", dense="q4")
    began = time.monotonic()
    process = start(source, tmp_path / "timed")
    process.communicate()
    seconds = time.monotonic() - began
    rng, target = random.Random(20261121), tmp_path / "mlx"
    killed = resumed = rounds = 0
    while killed < KILLS:
        process = start(source, target)
        time.sleep(rng.uniform(0, 0.6 * seconds))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        killed += process.returncode == -signal.SIGKILL and "done" not in output
        journal = tmp_path / ".mlx.converting" / "journal"
        resumed += journal.exists() and len(journal.read_text().splitlines()) > 1
        if not target.exists() and killed % 5:
            continue
        if not target.exists():
            convert_checkpoint(source, target, dense="q4")
        assert hashes(target) == hashes(tmp_path / "whole")
        for path in target.iterdir():
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
            path.unlink()
        target.rmdir()
        rounds += 1
    assert resumed >= 3, "no kill fell into the writing: the checkpoint is too small"
    assert rounds >= KILLS // 5


class Killed(BaseException):
    """Stands for a kill inside this process: nothing of ours may run after it."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", layers=2)


def convert_and_die(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, *, after_files: int, **options: Any
) -> None:
    """Leave the disk as a kill does, just before the next file is noted as finished."""
    real = staging.Staging.finish

    def finish(stage: staging.Staging, name: str, written: Any) -> None:
        if len(stage.done) == after_files:
            raise Killed
        real(stage, name, written)

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "finish", finish)
        patch.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            convert_checkpoint(source, target, **options)


def test_finished_files_are_not_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mlx"
    convert_and_die(source, target, monkeypatch, after_files=2)
    files = tmp_path / ".mlx.converting" / "files"
    for path in files.iterdir():
        os.utime(path, (1, 1))
    report = convert_checkpoint(source, target)
    assert 0 < report.resumed_bytes < report.weight_bytes
    kept = sorted(path.name for path in target.iterdir() if path.stat().st_mtime == 1)
    assert kept == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2)]
    assert hashes(target) == hashes(convert_checkpoint(source, tmp_path / "whole").target)
    assert not (tmp_path / ".mlx.converting").exists()


def test_space_is_needed_only_for_what_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_and_die(source, tmp_path / "mlx", monkeypatch, after_files=3)
    free = pipeline.SPARE_BYTES + 1_000_000  # the last file takes 0.4 MB, all four 3 MB
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ConversionError, match="bytes are needed"):
        convert_checkpoint(source, tmp_path / "other")
    assert convert_checkpoint(source, tmp_path / "mlx").resumed_bytes > 2_000_000


def test_a_torn_journal_line_is_not_believed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_and_die(source, tmp_path / "mlx", monkeypatch, after_files=3)
    journal = tmp_path / ".mlx.converting" / "journal"
    journal.write_text(journal.read_text()[:-40])
    report = convert_checkpoint(source, tmp_path / "mlx")
    assert 0 < report.resumed_bytes < report.weight_bytes
    assert hashes(report.target) == hashes(convert_checkpoint(source, tmp_path / "whole").target)


@pytest.mark.parametrize("change", ["options", "source", "size"])
def test_what_another_job_left_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    options = {"dense": "q8"} if change == "options" else {}
    convert_and_die(source, tmp_path / "mlx", monkeypatch, after_files=3, **options)
    if change == "source":
        source = write_checkpoint(source, layers=2, seed=1)
    if change == "size":
        for path in (tmp_path / ".mlx.converting" / "files").glob("*.safetensors"):
            path.write_bytes(b"torn")
    report = convert_checkpoint(source, tmp_path / "mlx")
    assert report.resumed_bytes == 0
    assert hashes(report.target) == hashes(convert_checkpoint(source, tmp_path / "whole").target)


def test_ctrl_c_keeps_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify_conversion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
    report = convert_checkpoint(source, tmp_path / "mlx")
    assert report.resumed_bytes == report.weight_bytes


def test_a_kill_just_after_the_rename(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is whole; the empty staging folder goes when the user comes back."""
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        convert_checkpoint(source, tmp_path / "mlx")
    assert (tmp_path / ".mlx.converting" / "journal").exists()
    before = hashes(tmp_path / "mlx")
    with pytest.raises(ConversionError, match="already exists"):
        convert_checkpoint(source, tmp_path / "mlx")
    assert hashes(tmp_path / "mlx") == before
    assert not (tmp_path / ".mlx.converting").exists()
