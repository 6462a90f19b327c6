"""One file from the hub to the disk: resumed, retried, and proven by size and hash.

Written here because huggingface_hub 2 no longer resumes after its process ends (each download is a
temporary file of its own) and compares sizes only. Its session is used, so proxies, certificates
and offline mode behave as in every other tool. Xet is not used: plain HTTP ranges can be resumed
and checked byte by byte.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import get_session, hf_raise_for_status

from mlx_gptoss.errors import DownloadError

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waits between attempts that brought no byte
PIECE_BYTES = 4 << 20
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)

OnBytes = Callable[[int], None]  # receives the number of bytes just done; negative if thrown away


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as the hub describes it.

    Attributes:
        name: Path in the repository.
        url: Where its bytes are.
        size_bytes: Its exact size.
        digest: sha256 (64 hex digits) of a large file, git's blob sha1 (40) of a small one. It is
            also the file's name in the hub cache.
    """

    name: str
    url: str
    size_bytes: int
    digest: str


def digest_of(path: Path, *, like: str, on_bytes: OnBytes | None = None) -> str:
    """The digest of a file on disk, of the kind that `like` is: sha256 or git's blob sha1."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:  # git hashes a header before the content
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            if on_bytes:
                on_bytes(len(piece))
    return digest.hexdigest()


def partial_path(target: Path) -> Path:
    """Where the bytes of an unfinished download are kept."""
    return target.with_name(target.name + ".incomplete")


def fetch(
    file: RemoteFile, target: Path, *, headers: dict[str, str], on_bytes: OnBytes | None = None
) -> None:
    """Bring one file to `target`, going on where an earlier attempt or process stopped.

    Args:
        file: What to fetch, with the size and digest it must have.
        target: Where it appears, in one rename, once its bytes are proven.
        headers: Of each request: authorisation and user agent.
        on_bytes: Called with the bytes brought so far by this call.

    Raises:
        DownloadError: The hub is unreachable, refuses, or sends other bytes; or the disk is full.
            What was received stays for the next call, unless its hash is wrong.
    """
    report = on_bytes or (lambda _: None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_partial(partial_path(target), file.name) as partial:
        for attempt in (1, 2):
            _receive_all(file, partial, headers, report)
            found = digest_of(partial_path(target), like=file.digest)
            if found == file.digest:
                os.replace(partial_path(target), target)
                return
            report(-file.size_bytes)
            partial.truncate(0)
            if attempt == 2:
                partial_path(target).unlink()
    raise DownloadError(
        f"{file.name}: expected hash {file.digest}, got {found}, twice; the bytes were thrown "
        f"away. A proxy or mirror ({file.url}) alters the file, or the disk is failing"
    )


@contextmanager
def open_partial(path: Path, name: str) -> Iterator[FileIO]:
    """Open an unfinished file for this process alone."""
    with FileIO(path, "ab") as partial:  # unbuffered: nothing left to flush on a full disk
        try:
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(
                f"{name}: another process is downloading it ({path}); wait for it or stop it"
            ) from None
        yield partial


def _receive_all(
    file: RemoteFile, partial: FileIO, headers: dict[str, str], report: OnBytes
) -> None:
    """Fill `partial` up to the announced size, through as many connections as it takes."""
    if partial.seek(0, os.SEEK_END) > file.size_bytes:
        partial.truncate(0)
    failures = 0
    while (have := partial.seek(0, os.SEEK_END)) < file.size_bytes:
        reason = "the connection ended early"
        try:
            _receive(file, partial, have, headers, report)
        except HTTPError as error:
            reason = reason_to_retry(error, file.name)
        except OSError as error:
            raise DownloadError(
                f"{file.name}: cannot write it: {error.strerror or error}; "
                "what was received is kept, run the command again to go on"
            ) from error
        failures = 0 if partial.seek(0, os.SEEK_END) > have else failures + 1
        if failures > len(BACKOFF_S):
            raise DownloadError(
                f"{file.name}: got {have} of {file.size_bytes} bytes, then nothing in {failures} "
                f"attempts ({reason}); what was received is kept, run the command again to go on"
            )
        if failures:
            time.sleep(BACKOFF_S[failures - 1])


def _receive(
    file: RemoteFile, partial: FileIO, have: int, headers: dict[str, str], report: OnBytes
) -> None:
    """Append what one connection brings; raise what the HTTP library raises."""
    # identity: a compressed body could be neither resumed nor measured
    wanted = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", file.url, headers=wanted, timeout=timeout) as response:
        hf_raise_for_status(response)
        if response.status_code == 200 and have:  # the whole file, whatever was asked
            partial.truncate(0)
            report(-have)
            have = 0
        announced = response.headers.get("Content-Length")
        if announced is not None and have + int(announced) != file.size_bytes:
            raise DownloadError(
                f"{file.name}: expected {file.size_bytes} bytes, the hub sends "
                f"{have + int(announced)}; the repository changed meanwhile or a mirror is stale, "
                "run the command again"
            )
        for piece in response.iter_bytes():  # as they come: a buffer would be lost with the line
            if have + len(piece) > file.size_bytes:
                raise DownloadError(f"{file.name}: expected {file.size_bytes} bytes, got more")
            rest = memoryview(piece)
            while rest:
                rest = rest[partial.write(rest) :]
            have += len(piece)
            report(len(piece))


def reason_to_retry(error: Exception, what: str) -> str:
    """Why another attempt may succeed, in a few words; raise where none can."""
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {error}".rstrip(": ")
    if error.response.status_code in RETRIED_STATUSES:
        return f"HTTP status {error.response.status_code}"
    raise _refusal(error, what) from error


def _refusal(error: HfHubHTTPError, what: str) -> DownloadError:
    """The hub's refusal as one of our errors, with what to do about it."""
    status = error.response.status_code
    if status in (401, 403):
        advice = (
            "it does not exist, is private, or is gated: accept its terms on its page, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    elif status == 404:
        advice = "no such repository, revision or file: check the spelling"
    else:
        advice = "the hub answered what we cannot use; try again later"
    return DownloadError(f"{what}: HTTP status {status} from {error.response.url}; {advice}")
