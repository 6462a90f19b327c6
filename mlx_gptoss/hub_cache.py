"""The local side of the hub: its cache on disk, without any network."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from mlx_gptoss.errors import CheckpointError, DownloadError
from mlx_gptoss.transfer import RemoteFile
from mlx_gptoss.weight_files import INDEX, read_json


class HubCache:
    """One repository's folder in the hub cache, in huggingface_hub's layout.

    blobs/<hash> holds the bytes, snapshots/<commit>/<name> links to them, refs/<branch> names the
    commit a branch was last seen at.

    Args:
        repo_id: As in "openai/gpt-oss-20b".
        cache_dir: The hub cache; None: where huggingface_hub keeps it (HF_HUB_CACHE, HF_HOME).

    Raises:
        DownloadError: `repo_id` is no id of a repository.
    """

    def __init__(self, repo_id: str, cache_dir: Path | None) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or ".." in repo_id or "--" in repo_id:
            raise DownloadError(f"expected a hub id like openai/gpt-oss-20b, got {repo_id!r}")
        self.repo_id = repo_id
        folder = "--".join(["models", *repo_id.split("/")])
        self.root = Path(cache_dir or constants.HF_HUB_CACHE) / folder

    def blob(self, file: RemoteFile) -> Path:
        """Where a file's bytes are or will be."""
        return self.root / "blobs" / file.digest

    def snapshot(self, commit: str) -> Path:
        """The folder a reader opens."""
        return self.root / "snapshots" / commit

    def commit(self, revision: str) -> str | None:
        """The commit a revision was last seen at; None if it was never fetched."""
        if self.snapshot(revision).is_dir():
            return revision
        ref = self.root / "refs" / revision
        return ref.read_text(errors="replace").strip() if ref.is_file() else None

    def link(self, commit: str, revision: str, files: Sequence[RemoteFile]) -> None:
        """Make the snapshot: links to the blobs, and the branch pointing to the commit."""
        for file in files:
            pointer = self.snapshot(commit) / file.name
            pointer.parent.mkdir(parents=True, exist_ok=True)
            staged = pointer.with_name(pointer.name + ".link")
            staged.unlink(missing_ok=True)
            staged.symlink_to(os.path.relpath(self.blob(file), pointer.parent))
            staged.replace(pointer)
        if revision != commit:
            ref = self.root / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            staged = ref.with_name(ref.name + ".new")
            staged.write_text(commit)
            staged.replace(ref)


def find_snapshot(
    repo_id: str, *, revision: str = "main", cache_dir: Path | None = None
) -> Path | None:
    """The complete local copy of a repository in the hub cache, or None; never the network."""
    cache = HubCache(repo_id, cache_dir)
    commit = cache.commit(revision)
    if commit is None or missing_files(cache.snapshot(commit)):
        return None
    return cache.snapshot(commit)


def free_bytes(folder: Path) -> int:
    """Free space on the disk that a folder is on or, if it does not exist yet, will be on."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def missing_files(folder: Path) -> list[str]:
    """Names of the files a checkpoint folder lacks: its config, and the shards its index names."""
    expected = {"config.json"}
    index = folder / INDEX
    if index.is_file():
        try:
            expected |= {str(file) for file in read_json(index)["weight_map"].values()}
        except (CheckpointError, KeyError, AttributeError):
            return [f"a readable {INDEX}"]
    elif not list(folder.glob("*.safetensors")):
        expected.add("model.safetensors")
    return sorted(name for name in expected if not (folder / name).is_file())
