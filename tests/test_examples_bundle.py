"""The examples as apps: PyInstaller's hooks, py2app's recipe, the page, and a bundle at work.

`python tests/test_examples_bundle.py` bundles the window and takes its picture for the page.
"""

import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from test_packaging import build_wheel
from xvfb import Screen, png, screen_or_skip

from mlx_gptoss import Runtime

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "tests" / "examples"
PAGE = EXAMPLES / "README.md"
HOOKS = ROOT / "mlx_gptoss" / "_pyinstaller"
QUESTION = "What is the capital of France?"


@pytest.fixture
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Screen]:
    with screen_or_skip(tmp_path_factory.mktemp("screen")) as screen:
        yield screen


def test_the_hooks_find_what_a_mac_needs(tmp_path: Path) -> None:
    """A mlx as its macOS wheels lay it out: without __init__.py, the Metal library in lib/."""
    pytest.importorskip("PyInstaller", reason="PyInstaller is not installed")
    (tmp_path / "mlx" / "lib").mkdir(parents=True)
    for name in ("core.py", "lib/mlx.metallib", "lib/libmlx.dylib", "lib/libjaccl.dylib"):
        (tmp_path / "mlx" / name).touch()
    code = (
        "import json, runpy, sys; sys.path[:0] = [sys.argv[1]]; "
        "print(json.dumps(runpy.run_path(sys.argv[2])['datas']))"
    )

    def datas(hook: str) -> list[tuple[str, str]]:
        command = [sys.executable, "-c", code, str(tmp_path), str(HOOKS / hook)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [(str(Path(source)), folder) for source, folder in json.loads(done.stdout)]

    assert datas("hook-mlx.core.py") == [(str(tmp_path / "mlx/lib/mlx.metallib"), "mlx/lib")]
    carried = {f"{folder}/{Path(source).name}" for source, folder in datas("hook-mlx_gptoss.py")}
    read = [*(ROOT / "mlx_gptoss/data").iterdir(), *(ROOT / "metal").glob("*.metal")]
    read += (ROOT / "metal").glob("*.h")
    assert carried == {f"mlx_gptoss/{path.parent.name}/{path.name}" for path in read}


def test_the_py2app_recipe_names_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    runpy.run_path(str(EXAMPLES / "setup_py2app.py"))
    options = given["options"]["py2app"]
    assert all((EXAMPLES / script).exists() for script in given["app"])
    for package in options["packages"]:  # py2app finds no package without __init__.py
        spec = find_spec(package)
        assert spec and spec.origin and spec.origin.endswith("__init__.py"), package
    assert all(find_spec(name) for name in options["includes"])
    [(folder, files)] = given["data_files"]
    assert folder.endswith("/lib-dynload/mlx/lib") and {"libmlx.so"} <= {
        Path(f).name for f in files
    }


def test_a_bundle_opens_models_without_metadata_of_packages() -> None:
    """py2app carries none: asked for MLX's version, it failed on every Mac with Metal."""
    sources = [*(ROOT / "mlx_gptoss").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    asking = {path.name for path in sources if "importlib.metadata" in path.read_text()}
    assert asking == {"bench_record.py", "doctor.py"}, "which no app imports"


def test_the_first_run_of_the_page_calls_us_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    monkeypatch.setenv("MLX_GPTOSS_HOME", "of the user")
    called: list[str] = []

    def strict(name: str, made: Any) -> None:
        """A double that takes what the real function takes."""
        double = create_autospec(names[name])
        double.side_effect = lambda *_, **__: called.append(name) or made
        names[name] = double

    fetched = SimpleNamespace(folder=tmp_path / "hub" / "snapshot")
    strict("download", fetched)
    strict("convert_checkpoint", None)
    monkeypatch.setattr(Runtime, "open", lambda name: called.append(name))
    names["open_model"]("20b", tmp_path, print)
    assert called == ["download", "convert_checkpoint", "20b"]
    source, target = names["convert_checkpoint"].call_args.args
    assert source == fetched.folder and target == tmp_path / "models" / "gpt-oss-20b"
    assert target.parent.is_dir()
    target.mkdir()
    names["open_model"]("20b", tmp_path, print)
    assert called[3:] == ["20b"]


def test_what_the_page_links_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text())
    assert links and [link for link in links if not (EXAMPLES / link).exists()] == []


@dataclass(frozen=True)
class Bundle:
    """A bundled app at work: its process, and the pictures of its transcript until it answered."""

    process: subprocess.Popen[str]  # with a pipe, so to be used in a `with` block
    frames: list[bytes]
    answer: str


def bundle(work: Path) -> Path:
    """Build the wheel, and from it the chat window as an app; returns the program."""
    with zipfile.ZipFile(build_wheel(work)) as wheel:
        wheel.extractall(work / "site")  # what pip does with a wheel of Python files
    options = ["--noconfirm", "--log-level", "WARN", "--name", "chat"]
    options += ["--distpath", "dist", "--workpath", "work", "--specpath", "."]
    options += ["--exclude-module", "pytest", "--exclude-module", "setuptools"]  # of tests alone
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", *options, str(EXAMPLES / "chat_window.py")],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(work / "site")},
        check=True,
    )
    return work / "dist" / "chat" / "chat"


def run_bundle(program: Path, screen: Screen, home: Path) -> Bundle:
    """Ask a question and look at the transcript's part of the screen until the answer is there."""
    process = subprocess.Popen(
        [program, "--temperature", "0", "--ask", QUESTION],
        cwd=home,
        env={"HOME": str(home), "DISPLAY": screen.display},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    frames: list[bytes] = []
    while not select.select([process.stdout], [], [], 0.05)[0]:
        frame = b"".join(screen.rows()[60:400])
        if frame not in frames[-1:]:
            frames.append(frame)
    return Bundle(process, frames, process.stdout.readline())


@pytest.fixture
def bundler() -> None:
    """Skip where this Python cannot be bundled."""
    pytest.importorskip("PyInstaller", reason="PyInstaller is not installed")
    from PyInstaller.depend.bindepend import get_python_library_path
    from PyInstaller.exceptions import PythonLibraryNotFoundError

    try:
        get_python_library_path()
    except PythonLibraryNotFoundError:
        pytest.skip("this Python has no shared library, which PyInstaller needs")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # PyInstaller takes half a minute of CPU, on a machine that may be busy
def test_the_window_works_as_a_bundled_app(screen: Screen, bundler: None, tmp_path: Path) -> None:
    """It gets nothing of this environment, and an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    program = bundle(tmp_path)
    running = run_bundle(program, screen, home)
    with running.process as process:
        process.send_signal(signal.SIGINT)  # closes the window
        assert process.wait(60) == 0
    assert "Paris" in running.answer
    assert len(running.frames) > 5, "the answer appeared at once, not as it was written"
    assert [path.name for path in (home / ".cache").iterdir()] == ["mlx-gptoss"]
    carried = {path.name for path in (program.parent / "_internal").iterdir()}
    assert {"mlx", "mlx_gptoss"} <= carried
    assert not carried & {"mlx_lm", "transformers", "torch"}


def take_picture() -> None:
    """Write the picture of the examples' page anew."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with Screen(work) as screen:
            running = run_bundle(bundle(work), screen, work)
            with running.process as process:
                time.sleep(1)  # the status line
                (EXAMPLES / "chat_window.png").write_bytes(png(screen.rows()))
                process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    take_picture()
