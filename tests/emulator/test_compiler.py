"""Finding a compiler, and what happens without a usable one."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import compiler
from mlx_gptoss.metal.emulator.compiler import find_compiler


def program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without clang and without ziglang."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MSL_CXX", raising=False)
    monkeypatch.setattr(compiler, "_zig", lambda: None)
    compiler._find.cache_clear()
    yield tmp_path
    compiler._find.cache_clear()


def test_finds_one_here() -> None:
    found = find_compiler()
    assert "clang" in found.version


def test_only_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(
        EmulatorError, match="emulator runs on Linux, not on darwin; on a Mac, run on Metal"
    ):
        find_compiler()


def test_no_clang_says_how_to_get_one(bare: Path) -> None:
    wanted = r"no clang for the Metal emulator; install one with `pip install ziglang` .* or "
    wanted += r"`apt-get install clang-19`, or set MSL_CXX to a clang\+\+ of version 18 or newer"
    with pytest.raises(EmulatorError, match=wanted):
        find_compiler()


def test_too_old_a_clang_is_named(bare: Path) -> None:
    error = 'echo "probe.cpp:3:14: error: __bf16 is not supported" >&2; exit 1'
    script = f'case "$*" in *--version*) echo "clang version 14.0.6";; *) {error};; esac'
    program(bare, "clang++", script)
    wanted = r"no clang for the Metal emulator; tried .*/clang\+\+: clang version 14.0.6 cannot "
    wanted += r"compile bfloat16 arithmetic \(.*error: __bf16 is not supported\)"
    with pytest.raises(EmulatorError, match=wanted):
        find_compiler()


def test_msl_cxx_is_the_only_candidate(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSL_CXX", "/no/such/clang++")
    with pytest.raises(EmulatorError, match=r"Metal kernels: cannot be run: No such file"):
        find_compiler()
    monkeypatch.setenv("MSL_CXX", program(bare, "gcc", "echo gcc 12; exit 1"))
    with pytest.raises(EmulatorError, match=r"gcc' cannot compile Metal kernels: gcc 12 cannot"):
        find_compiler()
    monkeypatch.setenv("MSL_CXX", "ziglang")
    with pytest.raises(EmulatorError, match="MSL_CXX=ziglang, but the wheel is missing; install"):
        find_compiler()


def test_the_first_that_works_is_taken(bare: Path) -> None:
    works = 'case "$*" in *--version*) echo clang version 20;; esac'
    program(bare, "clang++-20", works)
    program(bare, "clang++", works)
    program(bare, "clang++-21", "exit 1")
    assert find_compiler().command == (str(bare / "clang++-20"),)


@pytest.mark.skipif(compiler._zig() is None, reason="the ziglang wheel is not installed")
def test_ziglang_compiles_kernels() -> None:
    """Where apt's clang comes first, the wheel's is tried here, in a process of its own."""
    code = (
        "from tests.emulator.row_sum import run, X; y, report = run(); "
        "assert abs(y - X.sum(1)).max() < 2e-5; "
        "assert report.lines['row_sum.metal', 10].load_bytes == X.nbytes; "
        "from mlx_gptoss.metal.emulator import ptx; from tests.emulator.row_sum import SOURCE; "
        "assert ptx.build(SOURCE, 'row_sum<float>').stack_bytes == 0"
    )
    environment = os.environ | {"MSL_CXX": "ziglang"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)


def test_two_processes_may_build_the_same(tmp_path: Path) -> None:
    """Both find a whole library, and nothing is left of the building."""
    code = (
        "from mlx_gptoss.metal.emulator.runtime import library; library().emu_free_all(); "
        "from tests.emulator.row_sum import run; run()"
    )
    zig = str(compiler.cache_folder() / "zig")  # zig's own cache may stay: filling it takes seconds
    environment = os.environ | {"MSL_CACHE": str(tmp_path / "cache"), "ZIG_GLOBAL_CACHE_DIR": zig}
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment) for _ in range(2)
    ]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    left = sorted(p.name.split("-")[0] for p in (tmp_path / "cache").glob("*") if p.name != "zig")
    assert left == ["row_sum_float_", "runtime"]


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSL_CACHE", str(tmp_path))
    assert compiler.cache_folder() == tmp_path
    monkeypatch.delenv("MSL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert compiler.cache_folder() == Path("/some/cache/mlx-gptoss/emulator")
