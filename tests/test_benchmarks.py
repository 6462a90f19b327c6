"""The programs under benchmarks/: what every one of them does with its arguments."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
PROGRAMS = sorted(
    path for path in FOLDER.rglob("*.py") if '__name__ == "__main__"' in path.read_text()
)


@pytest.fixture(params=PROGRAMS, ids=lambda path: path.stem)
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each of them, its imports found as they are when Python is given its file."""
    path: Path = request.param
    if "import torch" in path.read_text():
        pytest.importorskip("torch", reason="this program trains with torch")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("COLUMNS", "300")
    return path


def exit_of(program: Path, *arguments: str) -> object:
    """The status with which a program ends, at once."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [str(program), *arguments])
        runpy.run_path(str(program), run_name="__main__")
    return ended.value.code


def test_arguments_are_read_before_anything_runs(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two programs ignored theirs: `--help` began a run of ten minutes."""
    assert exit_of(program, "--help") == 0
    usage, _, said = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: {program.name} [-h]") and len(said.split()) > 5
    needed = re.sub(r"\[[^]]*\]", "", usage).split()[2:]
    values = [word if word.startswith("--") else "1" for word in needed]
    assert exit_of(program, *values, "--no-such-option") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and re.search(r"error: .*--no-such-option", shown.err), shown.err
