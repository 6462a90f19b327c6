"""The wheel, as a stranger gets it: built from the tree, installed into an empty environment."""

import os
import pwd
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", ".*_cache", ".hypo*"
)
PACKAGES = {
    "mlx_gptoss": "mlx_gptoss",
    "convert": "mlx_gptoss/convert",
    "metal": "mlx_gptoss/metal",
}


@dataclass(frozen=True)
class Installed:
    wheel: Path
    folder: Path  # of the virtual environment; the tests run outside the source tree

    def run(self, program: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.folder,
            env=clean | env,
            capture_output=True,
            text=True,
            timeout=240,
        )


@pytest.mark.slow
def test_the_wheel_works_for_a_stranger(tmp_path: Path) -> None:
    """One test, not several with a fixture: two workers would each build and install."""
    installed = install(tmp_path)
    holds_every_file_of_the_package_and_no_other(installed.wheel)
    every_module_imports_and_every_kernel_can_be_read(installed)
    the_command_is_there(installed)
    the_demo_answers(installed, tmp_path / "store")


def build_wheel(work: Path) -> Path:
    """Build a copy of the tree, so that nothing is left in it."""
    shutil.copytree(ROOT, work / "tree", symlinks=True, ignore=LEFT_OUT)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work)]
    subprocess.run([*build, str(work / "tree")], check=True, capture_output=True)
    [wheel] = work.glob("*.whl")
    return wheel


def install(work: Path) -> Installed:
    """Install the wheel with what it needs; pip keeps its user's settings."""
    wheel = build_wheel(work)
    venv.create(work / "venv", with_pip=True)
    ours = Installed(wheel, work / "venv")
    home = pwd.getpwuid(os.getuid()).pw_dir
    result = ours.run("python", "-m", "pip", "install", "--quiet", str(wheel), HOME=home)
    assert result.returncode == 0, result.stderr
    return ours


def holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    # pages for people may be left out: only what runs counts
    expected = set()
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    found = {name for name in names if ".dist-info/" not in name and not name.endswith(".md")}
    assert found == expected
    assert {"licenses/LICENSE", "licenses/NOTICE", "METADATA", "entry_points.txt"} <= metadata


def every_module_imports_and_every_kernel_can_be_read(installed: Installed) -> None:
    code = (
        "import importlib, pkgutil, mlx_gptoss\n"
        "from importlib.resources import files\n"
        "walked = pkgutil.walk_packages(mlx_gptoss.__path__, 'mlx_gptoss.')\n"
        "names = [m.name for m in walked if '__main__' not in m.name and '.hook-' not in m.name]\n"
        "for name in names: importlib.import_module(name)\n"
        "for name in mlx_gptoss.__all__: getattr(mlx_gptoss, name)\n"
        "for file in files('mlx_gptoss.metal').iterdir():\n"
        "    if file.name.endswith('.metal'): assert file.read_text()\n"
        "print(mlx_gptoss.__file__, len(names))"
    )
    result = installed.run("python", "-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    file, count = result.stdout.split()
    assert Path(file).is_relative_to(installed.folder), "the source tree was imported instead"
    apart = ("__main__", "hook-")  # PyInstaller reads hooks as files, while it builds
    sources = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    modules = [path for path in sources if not path.name.startswith(apart)]
    assert int(count) == len(modules) - 1  # the package itself is not among those walked


def the_command_is_there(installed: Installed) -> None:
    by_name = installed.run("mlx-gptoss", "--version")
    by_module = installed.run("python", "-m", "mlx_gptoss", "--version")
    assert by_name.stdout == by_module.stdout and by_name.stdout.startswith("mlx-gptoss, version ")


def the_demo_answers(installed: Installed, store: Path) -> None:
    question = "What is the capital of France?"
    answer = installed.run(
        "mlx-gptoss", "generate", "--temperature", "0", question, MLX_GPTOSS_HOME=str(store)
    )
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout
