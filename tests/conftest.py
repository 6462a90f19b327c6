"""What every test gets: a home of its own, and no network."""

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # peers' libraries read it at import; nothing may leave this machine
)
# compiled kernels outlive a test's home: shared by all workers, and by the next run
os.environ.setdefault("MSL_CACHE", str(Path(__file__).parent.parent / "build" / "emulator"))


@pytest.fixture(autouse=True)
def isolated_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Point HOME and the model store at an empty folder, so that no test reads a user's files."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.delenv("MLX_GPTOSS_HOME", raising=False)
    return home


@pytest.fixture(autouse=True)
def emulator_only_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test at the point where it needs the emulator, on a machine that cannot run it."""
    if sys.platform == "linux":
        return

    def skip() -> None:
        pytest.skip("the Metal emulator runs on Linux; `pytest -m metal` runs kernels on a Mac")

    monkeypatch.setattr("mlx_gptoss.metal.emulator.build.find_compiler", skip)
