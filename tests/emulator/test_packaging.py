"""The emulator comes with the wheel, and nothing of the runtime imports it."""

import ast
import tomllib
from pathlib import Path

from mlx_gptoss.metal.emulator.build import header_folder

ROOT = Path(__file__).parents[2]


def test_headers_and_runtime_are_package_data() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "mlx_gptoss.metal.emulator" in settings["packages"]
    patterns = settings["package-data"]["mlx_gptoss.metal.emulator"]
    folder = header_folder()
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    needed = {p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {p for p in needed if p.suffix != ".py"} == packed
    assert folder / "msl" / "metal_stdlib" in packed


def test_the_runtime_does_not_import_it() -> None:
    sources = [*(ROOT / "mlx_gptoss").glob("**/*.py"), *(ROOT / "convert").glob("*.py")]
    for path in [*sources, ROOT / "metal" / "__init__.py"]:
        if "emulator" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("emulator" in n for n in names), f"{path} imports the emulator"
