"""`mlx-gptoss convert`: where the result goes, what is said, and how it fails."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny import write_checkpoint

from mlx_gptoss import library
from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.cli import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", layers=2)


def test_the_folder_goes_to_stdout_and_the_proof_to_stderr(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "mlx", "--dense", "q8")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'mlx'}\n"
    assert "Hugging Face, MXFP4 experts" in result.stderr
    assert "converting: 2.2 MB of 2.2 MB" in result.stderr
    assert "verifying: 3.0 MB of 3.0 MB" in result.stderr
    assert "experts                       0, byte for byte" in result.stderr
    assert "0.500 steps (bound 0.5001)" in result.stderr
    assert open_checkpoint(tmp_path / "mlx").manifest is not None


def test_quiet_and_unverified(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "a", "--no-verify", "-q")
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'a'}\n", "")
    assert json.loads((tmp_path / "a" / "mlx_gptoss.json").read_text())["verified"] is None
    assert "verified    no (--no-verify)" in run(source, tmp_path / "b", "--no-verify").stderr


def test_published_models_go_where_they_are_looked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_GPTOSS_HOME", str(tmp_path / "store" / "models"))
    monkeypatch.setattr(library, "find_source", lambda name: source)
    result = run("20b", "-q")
    assert result.stdout == f"{tmp_path / 'store' / 'models' / 'gpt-oss-20b'}\n"
    assert library.find_model("20b") == tmp_path / "store" / "models" / "gpt-oss-20b"


def test_what_was_interrupted_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_gptoss.convert import pipeline

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify_conversion", interrupt)
        assert run(source, tmp_path / "mlx").exit_code == 130
    result = run(source, tmp_path / "mlx")
    assert result.exit_code == 0
    assert "resumed     3.0 MB were there already" in result.stderr


def test_failures_are_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    result = run(source, tmp_path / "taken")
    assert result.exit_code == 1
    line = f"Error: {tmp_path / 'taken'}: already exists; remove it or choose another target\n"
    assert result.stderr == line
    assert run("20b").exit_code == 1
    result = run(source)
    assert result.exit_code == 2
    assert "TARGET is needed unless SOURCE is 20b or 120b" in result.stderr
