"""What the commands share: notes and progress on stderr, sizes and rates in words."""

import logging
import os
import sys
import time
from typing import IO

import click

INTERVAL_S = 0.1


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether people watch a stream; one that was closed before we began is None."""
    return stream is not None and stream.isatty()


def is_dumb() -> bool:
    """Whether the terminal takes no codes and rewrites no lines, as those within editors."""
    return os.environ.get("TERM") == "dumb"


def note(text: str, *, quiet: bool = False) -> None:
    """Tell the user something beside the answer."""
    if not quiet:
        click.echo(text, err=True)


class _Notes(logging.Handler):
    """Turns what the package logs into notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


def show_log(*, quiet: bool) -> None:
    """Show what the package logs: warnings, and unless `quiet` what takes its time."""
    log = logging.getLogger("mlx_gptoss")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())


def failure(error: Exception) -> str:
    """What went wrong, in one line; of a disk or a permission in the system's words."""
    text = str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
    return " ".join(text.split())


def size(nbytes: float) -> str:
    """A size as disks and downloads are sold: 13.8 GB, 512.0 kB."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def duration(seconds: float) -> str:
    """A time that is still to pass, coarse as it should be: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """One line on stderr that says how far something is; plain lines where nobody watches.

    On a terminal the line is rewritten ten times a second; elsewhere, and on one that cannot, a
    line appears at each tenth of the way.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = is_terminal(sys.stderr) and not is_dumb()
        self._phase = ""
        self._began = self._told = 0.0
        self._first = 0
        self._tenth = -1
        self._width = 0

    def bytes(self, phase: str, done: int, total: int) -> None:
        """Show bytes of a phase, with rate and time left; a new phase starts a new line."""
        if self._quiet or not self._is_due(phase, done, total):
            return
        elapsed = time.monotonic() - self._began
        rate = (done - self._first) / elapsed if elapsed > 0 else 0.0
        text = f"{phase}: {size(done)} of {size(total)}"
        if rate > 0:
            text += f", {size(rate)}/s"
            if done < total:
                text += f", {duration((total - done) / rate)} left"
        self._show(text, done >= total)

    def count(self, phase: str, done: int, total: int) -> None:
        """Show a number of things of a phase, to people who watch and until it is over."""
        if done >= total:
            self.clear()
        elif self._live and not self._quiet and self._is_due(phase, done, total):
            self._show(f"{phase}: {done} of {total}", False)

    def share(self, phase: str, done: int, total: int) -> None:
        """Show percent of a phase and the time left, to people who watch and until it is over."""
        if done >= total:
            self.clear()
        elif self._live and not self._quiet and self._is_due(phase, done, total):
            text = f"{phase}: {100 * done // total} %"
            if fresh := done - self._first:
                left = (time.monotonic() - self._began) * (total - done) / fresh
                text += f", {duration(left)} left"
            self._show(text, False)

    def clear(self) -> None:
        """Take the line away, for something else to be printed."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, err=True)
            self._width = 0

    def _is_due(self, phase: str, done: int, total: int) -> bool:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._first, self._tenth = phase, now, done, -1
            self._told = 0.0
        if self._live:
            due = now - self._told >= INTERVAL_S or done >= total
        else:
            tenth = 10 * done // max(total, 1)
            due, self._tenth = tenth > self._tenth, max(tenth, self._tenth)
        if due:
            self._told = now
        return due

    def _show(self, text: str, final: bool) -> None:
        if not self._live:
            click.echo(text, err=True)
            return
        self.clear()
        if not final:  # a line that wraps could not be taken away
            text = text[: (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]
        click.echo(text, nl=final, err=True)
        self._width = 0 if final else len(text)
