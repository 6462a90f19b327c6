"""What a record of a measurement says of its software and its model, and the file it is kept in."""

import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gptoss._version import __version__
from mlx_gptoss.checkpoint import Checkpoint
from mlx_gptoss.machine import run_command
from mlx_gptoss.model import Model
from mlx_gptoss.transcripts import weights_digest


def software(model: Model, *, compare: bool) -> dict[str, str]:
    """Versions, commit and kernels; mlx-lm's too where it is compared."""
    kernels = model.kernels
    found = {
        "mlx-gptoss": " ".join(filter(None, (__version__, commit()))),
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "device": str(mx.default_device()),
        "kernels": f"{len(kernels.used)} of {len(kernels.functions)}",
        "kernels not used": "; ".join(sorted(set(kernels.fallbacks.values()))) or "none",
    }
    return found | ({"mlx-lm": version("mlx-lm")} if compare else {})


def model_facts(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a speed is of: the name as it was given, or the folder's, never a path."""
    config = checkpoint.config
    return {
        "name": checkpoint.folder.name if Path(name).is_dir() else name,
        "digest": weights_digest(checkpoint),
        "nbytes": checkpoint.nbytes,
        "dense": (checkpoint.manifest or {}).get("options", {}).get("dense"),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "experts": config.num_local_experts,
    }


def commit() -> str | None:
    """Of the checkout that this package runs from; None where it was installed."""
    git = ("git", "-C", str(Path(__file__).parent))
    if run_command((*git, "ls-files", "--error-unmatch", "_version.py")) is None:
        return None  # git may know a folder above, which is no business of ours
    return (run_command((*git, "describe", "--always", "--dirty")) or "").strip() or None


def file_name(record: Mapping[str, Any]) -> str:
    """<chip>_<memory>_<model>.json, as records are kept in benchmarks/results.

    What was measured with the embedding in its file has a name of its own.
    """
    machine = record["machine"]
    chip = re.sub(r"\((R|TM)\)|Apple|Processor|CPU|@.*", " ", machine["cpu"] or "")
    memory = f"{round((machine['memory_bytes'] or 0) / 2**30)}G"
    model = Path(record["model"]["name"]).name
    model += " table in file" * (record["settings"].get("embedding") == "file")
    parts = ("-".join(text.lower().split()) for text in (chip, memory, model))
    text = "_".join(part or machine["architecture"] for part in parts)
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in text) + ".json"
