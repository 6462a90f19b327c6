"""What the bits of keys and values depend on, as one short hash that files of them are named by.

Weights count by the manifest's hashes where there is a manifest, else by their files' sizes and
times. Arithmetic counts by the versions of this package and of MLX, and in a working copy by the
sources, so that a change of either never meets numbers of before.
"""

import hashlib
import platform
from pathlib import Path

import mlx.core as mx

from mlx_gptoss._version import __version__
from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.kernels.launch import source_text
from mlx_gptoss.manifest import MANIFEST
from mlx_gptoss.model import Model

FORMAT = 1  # of the files


def identity_of(folder: Path, model: Model) -> str:
    """The identity of a model in memory, 16 hex digits.

    Args:
        folder: The model was loaded from it.
        model: The model.
    """
    digest = hashlib.sha256()
    device = mx.device_info() if mx.metal.is_available() else {}
    mlx_version = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
    parts = [str(FORMAT), __version__, mlx_version, platform.platform(), platform.machine()]
    parts += [str(device), str(model.dtype)]
    parts += [source_text(stem) for stem in model.kernels.used]
    for part in parts:
        digest.update(part.encode() + b"\n")
    package = Path(__file__).parent
    sources = sorted([*package.glob("*.py"), *(package / "kernels").glob("*.py")])
    for path in [*sources, folder / "config.json", folder / MANIFEST]:
        if path.exists():
            digest.update(path.read_bytes())
    if not (folder / MANIFEST).exists():
        for path in sorted({entry.path for entry in open_checkpoint(folder).tensors.values()}):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
