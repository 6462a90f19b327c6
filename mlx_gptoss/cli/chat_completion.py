"""What Tab offers in a chat: commands, and what may follow them."""

import os
from collections.abc import Iterable
from pathlib import Path

from mlx_gptoss.harmony import ReasoningEffort

TAKE_FILES = ("/save", "/load", "/tools")
TAKE_MORE = (*TAKE_FILES, "/reasoning", "/system")


def completions(line: str, *, commands: Iterable[str]) -> list[str]:
    """Return the lines that a beginning can become; none if it is no command."""
    command, blank, argument = line.partition(" ")
    if not line.startswith("/"):
        return []
    if not blank:
        found = [name for name in commands if name.startswith(line)]
        return [f"{name} " if name in TAKE_MORE else name for name in found]
    if command == "/reasoning":
        return [f"{command} {level}" for level in ReasoningEffort if level.startswith(argument)]
    if command in TAKE_FILES:
        return [f"{command} {path}" for path in _paths(argument)]
    return []


def _paths(begun: str) -> list[str]:
    """Files and folders whose path begins with a text; hidden ones only if asked for."""
    folder, name = os.path.split(begun)
    try:
        entries = sorted(os.scandir(Path(folder or ".").expanduser()), key=lambda e: e.name)
    except OSError:
        return []
    shown = [e for e in entries if e.name.startswith(name) and (name or e.name[0] != ".")]
    return [os.path.join(folder, e.name) + (os.sep if e.is_dir() else "") for e in shown]
