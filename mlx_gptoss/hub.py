"""Checkpoints of the Hugging Face hub: download, find and prove them.

Files land in the ordinary hub cache, named by their hashes as every other tool names them, so what
another tool fetched is reused here and the other way round. Only safetensors and JSON are ever
fetched. Nothing is sent but the request, the user's token if there is one, and our name and
version: requests are built here, without huggingface_hub's telemetry fields.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import get_session, hf_raise_for_status

from mlx_gptoss import transfer
from mlx_gptoss._version import __version__
from mlx_gptoss.errors import DownloadError
from mlx_gptoss.hub_cache import HubCache, free_bytes, missing_files
from mlx_gptoss.transfer import RemoteFile, digest_of, fetch, partial_path

# (phase, bytes done, bytes in all); the phase is "verify" or "download"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One of OpenAI's two releases.

    Attributes:
        repo_id: Its repository on the hub.
        weights_bytes: Size of its tensors: the data part of its safetensors files.
    """

    repo_id: str
    weights_bytes: int


PUBLISHED = {
    "20b": PublishedModel(repo_id="openai/gpt-oss-20b", weights_bytes=13_761_264_768),
    "120b": PublishedModel(repo_id="openai/gpt-oss-120b", weights_bytes=65_248_815_744),
}


@dataclass(frozen=True, kw_only=True)
class Download:
    """What `download` did.

    Attributes:
        folder: The snapshot: a folder of links into the cache.
        revision: The commit.
        files: Names of the files, each proven against its hash.
        total_bytes: Their size.
        fetched_bytes: How much of it came over the network in this call.
    """

    folder: Path
    revision: str
    files: tuple[str, ...]
    total_bytes: int
    fetched_bytes: int


def download(
    repo_id: str,
    *,
    revision: str = "main",
    original: bool = False,
    offline: bool = False,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Download:
    """Bring a repository's safetensors and JSON files into the hub cache and prove each of them.

    Files already there are hashed and reused; unfinished ones are resumed.

    Args:
        repo_id: As in "openai/gpt-oss-20b".
        revision: Branch, tag or commit.
        original: Fetch OpenAI's own layout (the folder `original/`) too.
        offline: Use the local cache alone, as HF_HUB_OFFLINE=1 does for every call.
        cache_dir: The hub cache; default: where huggingface_hub keeps it (HF_HUB_CACHE, HF_HOME).
        endpoint: The hub's address; default: HF_ENDPOINT or huggingface.co.
        progress: Called with (phase, bytes done, bytes in all).

    Raises:
        DownloadError: Offline and incomplete, disk too small, hub unreachable or refusing, or
            bytes that do not match their hash. What was received stays for the next call.
    """
    cache = HubCache(repo_id, cache_dir)
    if not revision or revision.startswith("/") or ".." in revision:  # it becomes a path
        raise DownloadError(f"expected a branch, tag or commit, got {revision!r}")
    if offline or constants.HF_HUB_OFFLINE:
        return _prove_local(cache, revision, original, progress)
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    commit, listed = _list_files(repo_id, revision, endpoint)
    files = [file for file in listed if _is_wanted(file.name, original)]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise DownloadError(
            f"{repo_id}: expected safetensors files, got {len(listed)} files without one; "
            "pickled weights are never loaded"
        )
    missing = _unproven(cache, files, progress)
    _check_space(cache, missing)
    fetched = _fetch_all(cache, missing, progress)
    cache.link(commit, revision, files)
    return Download(
        folder=cache.snapshot(commit),
        revision=commit,
        files=tuple(file.name for file in files),
        total_bytes=sum(file.size_bytes for file in files),
        fetched_bytes=fetched,
    )


def _is_wanted(name: str, original: bool) -> bool:
    folder, _, base = name.rpartition("/")
    in_scope = folder == "" or (original and folder == "original")
    return in_scope and base.endswith((".safetensors", ".json"))


def _list_files(repo_id: str, revision: str, endpoint: str) -> tuple[str, list[RemoteFile]]:
    """The commit of a revision and its files, with sizes and hashes, as the hub lists them."""
    url = f"{endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
    info = _get_json(url, f"{repo_id} at {revision}")
    try:
        commit = _commit(info["sha"])
        base = f"{endpoint}/{repo_id}/resolve/{commit}"
        files = [_remote_file(entry, base) for entry in info["siblings"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{repo_id}: {url} did not answer as a hub does ({type(error).__name__}: {error}); "
            "check HF_ENDPOINT and proxies"
        ) from error
    return commit, files


def _commit(name: str) -> str:
    """A commit as the hub names it, checked: it becomes a folder."""
    if not re.fullmatch(r"[0-9a-f]{40}", name):
        raise ValueError(f"unsafe commit {name!r}")
    return name


def _get_json(url: str, what: str) -> Any:
    """What a URL answers; None if it is not JSON."""
    reason = ""
    for wait_s in (*transfer.BACKOFF_S[:3], None):
        try:
            response = get_session().get(
                url, headers=_headers(), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            hf_raise_for_status(response)
            return response.json()
        except HTTPError as error:
            reason = transfer.reason_to_retry(error, what)
        except ValueError:
            return None
        if wait_s is not None:
            time.sleep(wait_s)
    raise DownloadError(
        f"{what}: cannot reach {url.partition('/api/')[0]} ({reason}); check the connection, or "
        "pass --offline to use the local cache alone"
    )


def _remote_file(entry: dict, base: str) -> RemoteFile:
    """One entry of the hub's listing, checked: its name becomes a path and its hash a file name."""
    name, large = entry["rfilename"], entry.get("lfs")
    digest = large["sha256"] if large else entry["blobId"]
    if (
        name.startswith("/")
        or ".." in name.split("/")
        or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", digest)
    ):
        raise ValueError(f"unsafe file entry {name!r} with hash {digest!r}")
    return RemoteFile(
        name=name, url=f"{base}/{quote(name)}", size_bytes=int(entry["size"]), digest=digest
    )


def _headers() -> dict[str, str]:
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"user-agent": f"mlx-gptoss/{__version__}"}
    return headers | {"authorization": f"Bearer {token}"} if token else headers


def _unproven(
    cache: HubCache, files: Sequence[RemoteFile], progress: Progress | None
) -> list[RemoteFile]:
    """The files whose bytes are not in the cache with the right size and hash."""
    present = [file for file in files if _has_size(cache.blob(file), file.size_bytes)]
    on_bytes = _counter("verify", 0, sum(file.size_bytes for file in present), progress)
    proven = {
        file.name
        for file in present
        if digest_of(cache.blob(file), like=file.digest, on_bytes=on_bytes) == file.digest
    }
    return [file for file in files if file.name not in proven]


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _check_space(cache: HubCache, missing: Sequence[RemoteFile]) -> None:
    """Refuse before the first byte what the disk cannot hold."""
    free = free_bytes(cache.root)
    needed = sum(file.size_bytes for file in missing) - _received(cache, missing)
    if needed > free:
        raise DownloadError(
            f"{cache.repo_id}: expected {needed / 1e9:.1f} GB free for {cache.root}, got "
            f"{free / 1e9:.1f} GB; free some space, or set HF_HUB_CACHE to another disk"
        )


def _received(cache: HubCache, missing: Sequence[RemoteFile]) -> int:
    partials = [partial_path(cache.blob(file)) for file in missing]
    return sum(path.stat().st_size for path in partials if path.exists())


def _fetch_all(cache: HubCache, missing: Sequence[RemoteFile], progress: Progress | None) -> int:
    """Fetch files one after the other; the bytes that came over the network."""
    headers, fetched = _headers(), 0
    total = sum(file.size_bytes for file in missing)
    show = _counter("download", _received(cache, missing), total, progress)

    def on_bytes(count: int) -> None:
        nonlocal fetched
        fetched += max(count, 0)
        show(count)

    for file in missing:
        fetch(file, cache.blob(file), headers=headers, on_bytes=on_bytes)
    return fetched


def _counter(phase: str, done: int, total: int, progress: Progress | None) -> Callable[[int], None]:
    """Turn counts of bytes into calls of `progress` with the running sum."""

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(phase, done, total)

    return on_bytes


def _prove_local(
    cache: HubCache, revision: str, original: bool, progress: Progress | None
) -> Download:
    """`download` without a network: the cached files must be all there and match their names."""
    commit = cache.commit(revision)
    if commit is None:
        raise DownloadError(
            f"{cache.repo_id} at {revision}: offline, and not in the cache at {cache.root}; "
            "go online (unset HF_HUB_OFFLINE, no --offline) and run the command again"
        )
    folder = cache.snapshot(commit)
    if missing := missing_files(folder / "original" if original else folder):
        raise DownloadError(
            f"{cache.repo_id} at {revision}: offline, and {folder} lacks {', '.join(missing[:3])}; "
            "go online (unset HF_HUB_OFFLINE, no --offline) and run the command again"
        )
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    paths = [folder / name for name in names if _is_wanted(name, original)]
    on_bytes = _counter("verify", 0, sum(path.stat().st_size for path in paths), progress)
    for path in paths:
        digest = Path(os.readlink(path)).name if path.is_symlink() else ""
        found = digest_of(path, like=digest, on_bytes=on_bytes)
        if found != digest:
            raise DownloadError(
                f"{path}: expected hash {digest or 'in the name of a linked blob'}, got {found}; "
                "the copy is damaged: go online and run the command again"
            )
    return Download(
        folder=folder,
        revision=commit,
        files=tuple(str(path.relative_to(folder)) for path in paths),
        total_bytes=sum(path.stat().st_size for path in paths),
        fetched_bytes=0,
    )
