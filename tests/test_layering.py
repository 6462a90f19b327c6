"""Imports point one way, relative imports are banned, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import modules of lower rows, and of its own package. Every module has a row.
LAYERS = [
    ["_version", "errors", "_pyinstaller"],
    ["metal", "config_fields", "ring"],
    ["chips", "pacing", "config", "weight_files", "transfer"],
    ["manifest"],
    ["vocabulary", "checkpoint", "matrix", "rope", "hub_cache", "machine"],
    ["reference", "sampling", "table"],
    ["convert", "kernels", "cache"],
    ["attention", "moe", "decode_state"],
    ["layer_weights"],
    ["model", "unpack"],
    ["decode_weights"],
    ["decode_step"],
    ["decode"],
    ["demo", "hub"],
    ["steps", "dispatches", "generation_stats"],
    ["engine"],
    ["library", "model_info"],
    ["harmony", "plan", "transcripts", "routes", "kernel_faults"],
    ["rules"],
    ["fitting"],
    [
        "turn",
        "doctor",
        "verify",
        "roofline",
        "bench_record",
        "bench_runs",
        "conversation",
        "cache_files",
        "cache_identity",
        "tools",
    ],
    ["bench", "bench_plots", "stream", "structured", "cache_folder"],
    ["prefix_cache"],
    ["bench_text", "memory"],
    ["task"],
    ["owner", "bench_report"],
    ["request"],
    ["runtime"],
    ["cli"],
    ["__main__"],
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {("convert", "model"), ("model", "convert"), ("metal", "kernels")}


def sources() -> list[tuple[str, Path]]:
    """Every module of the wheel with the name of its unit (top-level module or subpackage)."""
    found = []
    for path in sorted((ROOT / "mlx_gptoss").glob("*.py")):
        if path.stem != "__init__":
            found.append((path.stem, path))
    for folder in (
        "convert",
        "metal",
        "mlx_gptoss/_pyinstaller",
        "mlx_gptoss/cli",
        "mlx_gptoss/harmony",
        "mlx_gptoss/kernels",
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.append((Path(folder).name, path))
    return found


def imported_units(path: Path) -> set[str]:
    """The units of this package that a source file imports, anywhere in it."""
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "mlx_gptoss":
                names = [f"mlx_gptoss.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        units |= {n.split(".")[1] for n in names if n.startswith("mlx_gptoss.")}
    return units & set(ROW)


@pytest.mark.parametrize(("unit", "path"), sources(), ids=lambda v: getattr(v, "name", v))
def test_imports_point_one_way(unit: str, path: Path) -> None:
    assert unit in ROW, f"{path}: give the module {unit!r} a row in LAYERS"
    for other in imported_units(path) - {unit}:
        assert ROW[other] < ROW[unit], f"{path} imports {other}, which is not below {unit}"
        assert (unit, other) not in FORBIDDEN, f"{path} must not import {other}"
        if other == "metal":
            assert unit == "kernels", f"{path}: only kernels reads metal/"


def test_files_stay_readable() -> None:
    paths = [path for _, path in sources()]
    paths += [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path): len(path.read_text().splitlines()) for path in paths}
    assert not {path: count for path, count in lines.items() if count > 400}, "split by meaning"


def test_importing_does_nothing() -> None:
    """The bare import loads no MLX, no numpy and no click, and changes no environment variable."""
    code = (
        "import os, sys; before = dict(os.environ); import mlx_gptoss; "
        "heavy = {'mlx', 'numpy', 'click', 'tiktoken', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
