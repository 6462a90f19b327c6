"""What stands between a user and a running model: one finding a fact, with advice where it helps.

Reads only: no network, no model is loaded, nothing is changed. A check that itself fails becomes a
finding, so a diagnosis always ends.
"""

import importlib.metadata
import importlib.util
import json
import mmap
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mlx_gptoss._version import __version__
from mlx_gptoss.chips import GIB
from mlx_gptoss.config import GPT_OSS_20B
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.fitting import Verdict, judge
from mlx_gptoss.library import kernel_record, model_store
from mlx_gptoss.machine import Machine
from mlx_gptoss.plan import MOST_SAVED, ON_CPU, ON_METAL, MemoryPlan, dense_quantization

OLDEST_MACOS = (14, 0)  # MLX publishes no Metal build for older ones
MATRIX_UNITS_MACOS = (26, 2)
MATRIX_UNITS_GENERATION = 17  # of the GPU's architecture, as in "applegpu_g17s": M5
LEAST_FREE_BYTES = 30 * 10**9  # 20b as downloaded and as converted, and a little


class Status(StrEnum):
    """How a finding bears on running a model."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact: `advice` is a line that says what to do, None where nothing needs doing."""

    name: str
    value: str
    status: Status = Status.OK
    advice: str | None = None


def diagnose(machine: Machine, *, hub_cache: Path | None = None) -> list[Finding]:
    """Every finding, in the order in which a newcomer needs them.

    Args:
        machine: from `read_machine`.
        hub_cache: of huggingface_hub; None: where it keeps it.

    Returns:
        The findings; never raises.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", lambda: _machine(machine)),
        ("system", lambda: _system(machine)),
        ("mlx", lambda: _mlx(machine)),
        ("memory", lambda: _memory(machine)),
        ("power", lambda: _power(machine)),
        ("kernels", _kernels),
        ("disk", _disk),
        ("models", lambda: _models(hub_cache)),
    ]
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # whatever it is, the other checks still help
            value = f"could not be checked: {type(error).__name__}: {error}"
            found.append(Finding(name=name, value=value, status=Status.NOTE))
    return found


def _machine(machine: Machine) -> Iterator[Finding]:
    if machine.system != "Darwin":
        value = f"{machine.system} {machine.architecture}, {machine.cpu or 'processor unknown'}"
        yield Finding(
            name="machine",
            value=value,
            status=Status.NOTE,
            advice="no Mac: models run on the processor alone, for tests and small models",
        )
        return
    if machine.architecture != "arm64":
        yield Finding(
            name="machine",
            value=f"{machine.cpu or 'unknown'}, Python for {machine.architecture}",
            status=Status.PROBLEM,
            advice="on Apple silicon, install Python for arm64 (this one runs in Rosetta); "
            "Intel Macs cannot run MLX",
        )
        return
    memory = f", {machine.memory_bytes / GIB:g} GB" if machine.memory_bytes else ""
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    speed = f", {machine.chip.bandwidth_gb_per_s:g} GB/s" if machine.chip else ""
    known = machine.chip is not None
    yield Finding(
        name="machine",
        value=f"{machine.cpu or 'chip unknown'}{cores}{memory}{speed}",
        status=Status.OK if known else Status.NOTE,
        advice=None if known else "this chip is not in our table: speed limits will not be shown",
    )


def _system(machine: Machine) -> Iterator[Finding]:
    old = machine.system == "Darwin" and _version(machine.os_version) < OLDEST_MACOS
    name = "macOS" if machine.system == "Darwin" else machine.system
    yield Finding(
        name="system",
        value=f"{name} {machine.os_version}, Python {sys.version.split()[0]}",
        status=Status.PROBLEM if old else Status.OK,
        advice="update to macOS 14 or newer: MLX has no Metal build for this one" if old else None,
    )


def _mlx(machine: Machine) -> Iterator[Finding]:
    versions = f"mlx {_installed('mlx')}, mlx-gptoss {__version__}"
    if machine.system != "Darwin":
        yield Finding(name="mlx", value=f"{versions}, no Metal on this system")
        return
    import mlx.core as mx

    if not mx.metal.is_available():
        yield Finding(
            name="mlx",
            value=f"{versions}, Metal not available",
            status=Status.PROBLEM,
            advice="install MLX for Apple silicon: pip install --force-reinstall mlx mlx-metal",
        )
        return
    yield Finding(name="mlx", value=f"{versions}, Metal on {machine.gpu_architecture}")
    yield from _matrix_units(machine)


def _matrix_units(machine: Machine) -> Iterator[Finding]:
    """M5's matrix units need a new enough GPU, macOS, and build of MLX's Metal library."""
    generation = re.search(r"applegpu_g(\d+)", machine.gpu_architecture or "")
    if not generation or int(generation[1]) < MATRIX_UNITS_GENERATION:
        yield Finding(name="matrix units", value="this GPU has none; M5 is the first with them")
    elif _version(machine.os_version) < MATRIX_UNITS_MACOS:
        yield Finding(
            name="matrix units",
            value=f"not used: they need macOS 26.2, this is {machine.os_version}",
            status=Status.NOTE,
            advice="update macOS: prompts are read several times faster with them",
        )
    elif not has_matrix_unit_kernels(_metal_library()):
        yield Finding(
            name="matrix units",
            value="not used: this build of MLX was made without them",
            status=Status.NOTE,
            advice="install MLX from PyPI (pip install mlx); other builds often lack them",
        )
    else:
        yield Finding(name="matrix units", value="used: GPU, macOS and MLX's build have them")


def has_matrix_unit_kernels(library: Path) -> bool:
    """Whether a Metal library holds kernels with "_nax" in their names, MLX's mark for them."""
    with library.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(b"_nax") >= 0


def _metal_library() -> Path:
    spec = importlib.util.find_spec("mlx")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / "lib" / "mlx.metallib").is_file():
            return path
    raise FileNotFoundError("mlx.metallib is not beside mlx")


def _memory(machine: Machine) -> Iterator[Finding]:
    limit = machine.gpu_limit_bytes
    if limit is None:
        yield Finding(
            name="memory",
            value="could not be read",
            status=Status.NOTE,
            advice="mlx-gptoss plan 20b --memory 16G answers for a size that you name",
        )
        return
    mac = machine.system == "Darwin"
    by_hand = ", raised by hand" if machine.wired_limit_bytes else ""
    value = f"the GPU may use {limit / 1e9:.1f} GB{by_hand}" if mac else f"{limit / 1e9:.1f} GB"
    wanted = MemoryPlan(
        config=GPT_OSS_20B,
        packing=dense_quantization(GPT_OSS_20B, "bf16"),
        context=8192,
        snapshots=MOST_SAVED,
        scratch=ON_METAL if mac else ON_CPU,
    )
    judged = judge(wanted, limit_bytes=limit, memory_bytes=machine.memory_bytes if mac else None)
    if judged.verdict is Verdict.FITS:
        yield Finding(name="memory", value=f"{value}: 20b fits, up to {judged.max_context} tokens")
        return
    advice = judged.options[0].change if judged.options else "a machine with more memory"
    yield Finding(
        name="memory",
        value=f"{value}: 20b with 8192 tokens needs {wanted.total_bytes / 1e9:.1f} GB",
        status=Status.NOTE,
        advice=f"to run 20b: {advice} (all options: mlx-gptoss plan 20b)",
    )


def _power(machine: Machine) -> Iterator[Finding]:
    slow = []
    if machine.low_power_mode:
        slow.append("low-power mode is on: turn it off in System Settings, Battery")
    if machine.power_source == "Battery Power":
        slow.append("on battery: plug in for full speed")
    if machine.thermal_pressure not in (None, "nominal"):
        slow.append("the machine is hot: let it cool before measuring")
    if machine.power_source or slow:
        heat = machine.thermal_pressure or "unknown"
        value = f"{machine.power_source or 'source unknown'}, heat {heat}"
        status = Status.NOTE if slow else Status.OK
        yield Finding(name="power", value=value, status=status, advice="; ".join(slow) or None)


def _kernels() -> Iterator[Finding]:
    """Each kernel, as a 20b that was loaded here found them, or else with random weights."""
    import mlx.core as mx

    from mlx_gptoss.kernels.selection import NO_METAL, choose_kernels, sizes_of

    if not mx.metal.is_available():
        yield Finding(name="kernels", value=f"MLX's operations run instead: {NO_METAL}")
        return
    chosen = choose_kernels(
        "auto",
        sizes_of(GPT_OSS_20B),
        dtype=mx.bfloat16,
        dense=["plain"],
        layers=[],
        expert_input_bound=0,
        record=kernel_record(),
    )
    used = f"{len(chosen.used)} of {len(chosen.functions)} are used"
    yield Finding(name="kernels", value=f"{used}: {', '.join(chosen.used)}")
    for stem, reason in chosen.fallbacks.items():
        yield Finding(
            name="kernels",
            value=f"{stem} runs as plain MLX: {reason}",
            status=Status.NOTE,
            advice="report this line with the output of `mlx-gptoss doctor --json`",
        )


def _disk() -> Iterator[Finding]:
    store = model_store()
    place = next(folder for folder in (store, *store.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    small = free < LEAST_FREE_BYTES
    yield Finding(
        name="disk",
        value=f"{free / 1e9:.1f} GB free for {store}",
        status=Status.NOTE if small else Status.OK,
        advice=(
            "20b needs 30 GB while it is converted; MLX_GPTOSS_HOME puts models elsewhere"
            if small
            else None
        ),
    )


def _models(hub_cache: Path | None) -> Iterator[Finding]:
    from huggingface_hub import constants

    folders = [(path.name, path) for path in _subfolders(model_store())]
    for path in _subfolders(Path(hub_cache or constants.HF_HUB_CACHE)):
        if path.name.startswith("models--") and "gpt-oss" in path.name.lower():
            name = path.name.removeprefix("models--").replace("--", "/")
            folders += [(name, snapshot) for snapshot in _subfolders(path / "snapshots")]
    found = [finding for name, folder in folders if (finding := _model(name, folder))]
    yield from found
    if not found:
        yield Finding(
            name="model",
            value="none but the demo, which is in the package",
            status=Status.NOTE,
            advice="mlx-gptoss download 20b, then mlx-gptoss convert 20b",
        )


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _model(name: str, folder: Path) -> Finding | None:
    """What a folder holds; None if it is no gpt-oss model at all."""
    from mlx_gptoss.checkpoint import open_checkpoint

    if "/" not in name and not (folder / "config.json").is_file():
        return None  # the store holds other things too; what the hub names gpt-oss should be one
    try:
        if json.loads((folder / "config.json").read_text()).get("model_type") != "gpt_oss":
            return None
    except (OSError, ValueError, AttributeError):
        advice = f"nothing readable in {folder}: fetch it again with mlx-gptoss download {name}"
        return Finding(name="model", value=name, status=Status.NOTE, advice=advice)
    try:
        checkpoint = open_checkpoint(folder)
    except GptOssError as error:
        text = " ".join(str(error).split())
        return Finding(name="model", value=name, status=Status.NOTE, advice=text)
    origin = "converted by us" if checkpoint.manifest else "converted by another tool: no hashes"
    return Finding(name="model", value=f"{name}: {checkpoint.nbytes / 1e9:.1f} GB, {origin}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
