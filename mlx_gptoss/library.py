"""Model names: from "demo", "20b", a folder or a hub id to a local folder that can be loaded.

Converted models live in the model store: $MLX_GPTOSS_HOME, or mlx-gptoss in the user's cache
folder. Finding a model never uses the network; a model that is not here is an error that names the
commands that bring it.
"""

import os
import re
from pathlib import Path

from mlx_gptoss.errors import ModelNotFoundError
from mlx_gptoss.hub import PUBLISHED
from mlx_gptoss.hub_cache import HubCache, find_snapshot, free_bytes
from mlx_gptoss.manifest import MANIFEST

DEMO = "demo"


def model_store() -> Path:
    """The folder of converted models; it need not exist yet.

    Raises:
        ModelNotFoundError: It is below the home of a user who has none.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    store = Path(os.environ.get("MLX_GPTOSS_HOME") or cache / "mlx-gptoss")
    try:
        return store.expanduser()
    except RuntimeError:
        raise ModelNotFoundError(
            f"{store}: this user has no home folder; set MLX_GPTOSS_HOME to the folder of models"
        ) from None


def kernel_record() -> Path:
    """The file that keeps which kernels agree with their definitions on this machine."""
    return model_store() / "kernels.json"


def find_model(name: str, *, cache_dir: Path | None = None) -> Path:
    """The local folder of a model.

    Args:
        name: "demo", "20b", "120b", a folder, or a hub id whose files are in the hub cache. The
            demo is made at its first use.
        cache_dir: The hub cache; None: where huggingface_hub keeps it.

    Returns:
        A folder for `load_model`, which checks what is in it.

    Raises:
        ModelNotFoundError: There is no such model here; says how to get it.
    """
    if name == DEMO:
        from mlx_gptoss.demo import demo_model_path

        return demo_model_path(model_store())
    if known := published_name(name):
        return _find_published(known, cache_dir)
    folder = Path(os.path.expanduser(name))  # pathlib's raises where there is no such user
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ModelNotFoundError(f"{name}: expected a folder with a converted model, got a file")
    if not _is_hub_id(name):
        raise ModelNotFoundError(
            f"{name or repr(name)}: expected demo, {', '.join(PUBLISHED)}, a folder or a hub id "
            "(owner/name), got a name that is none of them"
        )
    if snapshot := find_snapshot(name, cache_dir=cache_dir):
        return snapshot
    raise ModelNotFoundError(
        f"{name}: no such folder, and no complete copy in the hub cache; "
        f"run `mlx-gptoss download {name}`"
    )


def published_name(name: str) -> str | None:
    """The short name of one of OpenAI's two models, given by it or by its hub id; else None."""
    return next((short for short, p in PUBLISHED.items() if name in (short, p.repo_id)), None)


def converted_folder(short: str) -> Path:
    """Where the store keeps the converted form of a published model, "20b" or "120b"."""
    return model_store() / PUBLISHED[short].repo_id.partition("/")[2]


def find_source(name: str, *, cache_dir: Path | None = None) -> Path:
    """The folder of an unconverted checkpoint.

    Args:
        name: A folder, "20b", "120b", or a hub id whose files are in the hub cache.
        cache_dir: The hub cache; None: where huggingface_hub keeps it.

    Raises:
        ModelNotFoundError: There is no such checkpoint here; says how to get it.
    """
    known = published_name(name)
    folder = Path(os.path.expanduser(name))
    if not known and (folder.exists() or not _is_hub_id(name)):
        return folder  # the converter says what is wrong with it
    repo_id = PUBLISHED[known].repo_id if known else name
    if snapshot := find_snapshot(repo_id, cache_dir=cache_dir):
        return snapshot
    size = f" ({_size_and_space(known, cache_dir)})" if known else ""
    raise ModelNotFoundError(
        f"{name}: no complete copy in the hub cache; run `mlx-gptoss download {name}`{size}"
    )


def _find_published(short: str, cache_dir: Path | None) -> Path:
    folder = converted_folder(short)
    if (folder / MANIFEST).is_file():
        return folder
    if find_snapshot(PUBLISHED[short].repo_id, cache_dir=cache_dir):
        raise ModelNotFoundError(
            f"{short}: downloaded, but not converted: {folder} does not exist; "
            f"run `mlx-gptoss convert {short}`"
        )
    raise ModelNotFoundError(
        f"{short}: not on this machine; run `mlx-gptoss download {short}` "
        f"({_size_and_space(short, cache_dir)}), then `mlx-gptoss convert {short}`"
    )


def _size_and_space(short: str, cache_dir: Path | None) -> str:
    model = PUBLISHED[short]
    free = free_bytes(HubCache(model.repo_id, cache_dir).root)
    return f"{model.weights_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB free"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
