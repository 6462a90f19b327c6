"""A folder of prefix caches that outlive the process; see `cache_files` for one of its files.

Found by the longest beginning of a prompt, bounded in bytes, the least recently used removed first.
Several processes may use it at once: files appear whole, are never changed, and may be removed by
anybody. Only files of the model's own identity are looked at: the same weights, arithmetic,
kernels and machine. The others age and go.

Files are found, read and written in threads of their own, not in the one that owns the model: the
disk holds up nobody but the turn that begins with what is read, and all of them where what waits to
be written leaves no memory for the next. What goes wrong with the disk is a warning, never an
error: the tokens are computed anew.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlx_gptoss.cache_files import NAME, PART, Content, Entry, SavedState, remove_parts, write
from mlx_gptoss.cache_identity import identity_of
from mlx_gptoss.errors import CacheError, CheckpointError
from mlx_gptoss.model import Model

log = logging.getLogger("mlx_gptoss")

FOLDER_BYTES = 4 * 2**30  # most bytes of a folder
MOST_FILES = 1000  # of a folder: each header is read once by every process
READERS = 4  # files that are read at once


@dataclass(eq=False)
class Saved:
    """A state that was given to a folder.

    Attributes:
        path: Its file; the one before it, if any, where it could not be written.
    """

    path: Path | None = None


@dataclass(eq=False)
class _Job:
    content: Content
    saved: Saved
    replaces: Saved | None
    unless_held: bool = False  # by a file with the same tokens


@dataclass(frozen=True)
class Found:
    """A cache that was read.

    Attributes:
        state: How many tokens of the prompt it holds, and their keys and values.
        saved: Its file, if nothing but its end was left out.
    """

    state: SavedState
    saved: Saved | None


class CacheFolder:
    """The files of one model in a folder.

    Args:
        folder: Made if there is none, for its owner only.
        identity: What the numbers depend on, 16 hex digits; see `cache_identity`.
        budget_bytes: Most bytes of all files, of other models too.

    Raises:
        CacheError: It is no folder, or nothing can be written there.
    """

    def __init__(self, folder: Path, *, identity: str, budget_bytes: int = FOLDER_BYTES):
        self._folder, self._identity, self._budget_bytes = folder, identity, budget_bytes
        self._entries: dict[str, Entry | None] = {}  # None: damaged
        self._index = threading.RLock()  # held to look at entries, not to read what they hold
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="mlx-gptoss-cache-reader")
        self._jobs: list[_Job] = []  # the first one is being written
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._warned: set[str] = set()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"{folder}: expected a folder for caches, or a place to make one: {error.strerror}"
            ) from None
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise CacheError(
                f"{folder}: expected a folder that can be written, got one that cannot"
            )
        remove_parts(folder)

    @property
    def waiting_bytes(self) -> int:
        """Size of what is still to be written, which is held in memory until then."""
        with self._changed:
            return sum(job.content.nbytes for job in self._jobs)

    def search(
        self, prompt: Sequence[int], *, more_than: int, sliding: Sequence[bool]
    ) -> Future[Found | None]:
        """Begin to read the longest beginning of a prompt that a file holds.

        Args:
            prompt: Token ids.
            more_than: What is had without it, in tokens.
            sliding: Which layers of the model are.

        Returns:
            What will have been read; None if no file holds more than that.
        """
        return self._readers.submit(self._find, prompt, more_than, sliding)

    def save_shared(self, content: Content) -> None:
        """Have a file written soon, unless one holds just these tokens, which counts as used."""
        self._enqueue(_Job(content, Saved(), None, unless_held=True))

    def save(self, content: Content, *, replaces: Saved | None = None) -> Saved | None:
        """Have a file written soon.

        Args:
            content: Of it.
            replaces: An earlier state of the same conversation, removed once this one is written.

        Returns:
            What the next state replaces.
        """
        job = _Job(content, Saved(), replaces)
        return job.saved if self._enqueue(job) else replaces

    def _enqueue(self, job: _Job) -> bool:
        if (nbytes := job.content.nbytes) > self._budget_bytes:
            self._warn(
                f"{self._folder}: a conversation of {nbytes} bytes is not kept there: "
                f"expected at most {self._budget_bytes}"
            )
            return False
        with self._changed:
            for other in self._jobs[1:]:
                if other.saved is job.replaces:  # not begun: never needed
                    self._jobs.remove(other)
                    job.replaces = other.replaces
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="mlx-gptoss-cache", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return True

    def flush(self) -> None:
        """Wait until everything is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def close(self) -> None:
        """Write what is left, and end the threads."""
        self._readers.shutdown(cancel_futures=True)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _find(self, prompt: Sequence[int], more_than: int, sliding: Sequence[bool]) -> Found | None:
        while best := self._best(prompt):
            length, entry = best
            if length <= more_than:
                return None
            try:
                state = entry.read_state(length, sliding=sliding)
            except (OSError, CacheError) as error:
                self._give_up(entry.path.name, error)
                continue
            _mark_used(entry.path)
            last = max(entry.ledger.positions, default=length + 1)
            return Found(state, Saved(entry.path) if length >= last else None)
        return None

    def _best(self, prompt: Sequence[int]) -> tuple[int, Entry] | None:
        """The longest beginning of a prompt in a file, in tokens; the smaller file on a tie."""
        starts = [(entry.ledger.best_start(prompt).length, entry) for entry in self._look()]
        return max(starts, key=lambda at: (at[0], -len(at[1].ledger.tokens)), default=None)

    def _holds(self, tokens: Sequence[int]) -> bool:
        """Whether a file holds just these tokens; it counts as used then."""
        for entry in self._look():
            if entry.ledger.tokens == list(tokens):
                _mark_used(entry.path)
                return True
        return False

    def _look(self) -> list[Entry]:
        """The files there are now."""
        try:
            names = {name for name in os.listdir(self._folder) if self._is_ours(name)}
        except OSError as error:
            self._warn(f"{self._folder}: cannot be read: {error.strerror}")
            names = set()
        with self._index:
            self._entries = {name: e for name, e in self._entries.items() if name in names}
            for name in sorted(names - self._entries.keys()):
                try:
                    self._entries[name] = Entry.read(self._folder / name)
                except (OSError, CacheError, CheckpointError) as error:
                    self._give_up(name, error)
            return [entry for entry in self._entries.values() if entry is not None]

    def _is_ours(self, name: str) -> bool:
        match = NAME.fullmatch(name)
        return match is not None and match[1] == self._identity

    def _give_up(self, name: str, error: Exception) -> None:
        """Use a file no more, and say why unless another process removed it."""
        path = self._folder / name
        with self._index:
            self._entries[name] = None
            if path.exists():
                log.warning("a cached conversation is removed and computed anew: %s", error)
                with contextlib.suppress(OSError):
                    path.unlink()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs[0]
            try:
                self._write(job)
            except Exception as error:
                self._warn(
                    f"{self._folder}: a conversation is not kept there: "
                    f"{getattr(error, 'strerror', None) or error}"
                )
            with self._changed:
                self._jobs.remove(job)
                del job
                self._changed.notify_all()

    def _write(self, job: _Job) -> None:
        if job.unless_held and self._holds(job.content.tokens):
            return
        job.saved.path = old = job.replaces.path if job.replaces else None
        self._make_room(job.content.nbytes)
        job.saved.path = write(self._folder, self._identity, job.content)
        if old is not None and old != job.saved.path:
            old.unlink(missing_ok=True)

    def _make_room(self, nbytes: int) -> None:
        """Remove the least recently used files until another one fits."""
        files: list[tuple[float, int, str]] = []
        for item in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                if NAME.fullmatch(item.name) or PART.fullmatch(item.name):
                    stat = item.stat()
                    files.append((stat.st_mtime, stat.st_size, item.path))
        total, count = sum(size for _, size, _ in files), len(files)
        for _, size, path in sorted(files):
            if total + nbytes <= self._budget_bytes and count < MOST_FILES:
                return
            Path(path).unlink(missing_ok=True)
            total, count = total - size, count - 1

    def _warn(self, text: str) -> None:
        """Tell it once: the disk will not be better in the next turn."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # another process removed it
        os.utime(path)


def open_folder(path: str | Path, model_folder: Path, model: Model) -> CacheFolder:
    """The caches that a folder holds for a model.

    Args:
        path: The folder; made if there is none.
        model_folder: The model was loaded from it.
        model: The model.

    Raises:
        CacheError: See `CacheFolder`.
    """
    return CacheFolder(Path(path).expanduser(), identity=identity_of(model_folder, model))
