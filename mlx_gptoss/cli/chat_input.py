"""Messages from a terminal, with a history, or from a pipe."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_gptoss.cli.chat_completion import completions
from mlx_gptoss.cli.console import is_terminal, note
from mlx_gptoss.library import model_store

FENCE = '"""'
HISTORY_LENGTH = 1000  # lines


class Lines(Iterator[str]):
    """Messages and commands, one by one, without surrounding space; empty ones are left out.

    Attributes:
        is_interactive: Whether somebody types them.
    """

    def __init__(self, *, is_interactive: bool) -> None:
        self.is_interactive = is_interactive

    def __next__(self) -> str:
        while True:
            try:
                if text := self._message():
                    return text
            except EOFError:
                if self.is_interactive:
                    note("")
                raise StopIteration from None
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                note("\n(type /quit or Ctrl-D to leave)")

    def _message(self) -> str:
        line = self._line("> ")
        if line.strip().startswith(FENCE):
            lines = self._fenced(line.strip().removeprefix(FENCE))
        else:
            lines = self._continued(line)
        return "\n".join(lines).strip()

    def _fenced(self, line: str) -> list[str]:
        whole = []
        while not line.rstrip().endswith(FENCE):
            whole.append(line)
            if (more := self._more()) is None:
                return whole
            line = more
        return [*whole, line.rstrip().removesuffix(FENCE)]

    def _continued(self, line: str) -> list[str]:
        whole = []
        while line.endswith("\\"):
            whole.append(line.removesuffix("\\"))
            if (more := self._more()) is None:
                return whole
            line = more
        return [*whole, line]

    def _more(self) -> str | None:
        """The next line of a message; None where input ends: what there is of it is sent."""
        try:
            return self._line(". ")
        except EOFError:
            return None

    def _line(self, prompt: str) -> str:
        if self.is_interactive:
            return input(prompt)
        line = "" if sys.stdin is None else sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode("utf-8", errors="replace").rstrip("\r\n")


@contextlib.contextmanager
def open_lines(commands: Iterable[str]) -> Iterator[Lines]:
    """Messages from standard input; those typed are remembered in the model store.

    Args:
        commands: What Tab completes, where somebody types.
    """
    if not is_terminal(sys.stdin):
        yield Lines(is_interactive=False)
        return
    import readline  # changes what input() does, so only where somebody types

    history = model_store() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LENGTH)
    _set_keys(list(commands))
    try:
        yield Lines(is_interactive=True)
    finally:
        _keep(history)


def _set_keys(commands: list[str]) -> None:
    """Let Tab complete commands, elsewhere it stays a character; take what is pasted as a whole."""
    import readline

    found: list[str] = []

    def candidate(word: str, number: int) -> str | None:
        line = readline.get_line_buffer()[: readline.get_endidx()]
        if not line.startswith("/"):
            readline.insert_text("\t")
            return None
        if number == 0:  # asked for one by one, and a folder may hold many
            found[:] = completions(line, commands=commands)
        return found[number][len(line) - len(word) :] if number < len(found) else None

    readline.set_completer(candidate)
    readline.set_completer_delims(" /")  # what is offered is shown without what stands before
    if "libedit" in (readline.__doc__ or ""):  # as on many Macs; it knows no pasted text
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # its lines are one message


def _keep(history: Path) -> None:
    """Write the history for its owner's eyes; a disk that refuses is no reason to fail."""
    import readline

    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.write_history_file(history)
