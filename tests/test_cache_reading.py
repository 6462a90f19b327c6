"""Files of caches are read beside the thread that owns the model."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scripted
from cache_folders import files_in
from cache_writer import IDENTITY
from running import GREEDY, LONG, open_model, wait_until

from mlx_gptoss.cache_files import Entry, SavedState
from mlx_gptoss.cache_folder import CacheFolder
from mlx_gptoss.errors import RuntimeClosedError
from mlx_gptoss.harmony import Message, user
from mlx_gptoss.runtime import Runtime


class Disk:
    """Reads of files, which last until `ready` and then may fail."""

    def __init__(self) -> None:
        self.begun, self.ready = threading.Event(), threading.Event()
        self.fault: Exception | None = None
        self._read = Entry.read_state

    def read(self, entry: Entry, length: int, **options: Any) -> SavedState:
        self.begun.set()
        if not self.ready.wait(30):
            raise AssertionError("nothing else was done while a file was read")
        if self.fault:
            raise self.fault
        return self._read(entry, length, **options)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(Entry, "read_state", lambda *given, **named: disk.read(*given, **named))
    return disk


def open_on(folder: Path, script: str, **options: Any) -> Runtime:
    files = partial(CacheFolder, folder, identity=IDENTITY)
    return open_model(scripted.ScriptedModel(script), files=lambda _: files(), **options)


@pytest.fixture
def said(tmp_path: Path) -> Iterator[list[Message]]:
    """A conversation in files, with its next question."""
    with open_on(tmp_path, scripted.ANSWERED) as runtime:
        reply = runtime.respond([user("Two and two?")], sampling=GREEDY)
    assert files_in(tmp_path)
    return [user("Two and two?"), *reply.messages, user("And three?")]


def test_a_turn_that_waits_for_its_file_holds_up_no_other(
    tmp_path: Path, said: list[Message], disk: Disk
) -> None:
    """The thread that owns the model read it, and no turn wrote a token meanwhile."""
    with open_on(tmp_path, LONG) as runtime:
        writing = runtime.stream("Hi", reasoning="low", sampling=GREEDY)
        next(writing)
        going_on = runtime.stream(said, sampling=GREEDY)
        assert disk.begun.wait(30)
        assert writing.reply().text == "word " * 400
        begun = runtime.respond("Hi", reasoning="high", sampling=GREEDY, max_tokens=3)
        assert begun.usage.completion_tokens == 3, "others begin, too"
        disk.ready.set()
        assert going_on.reply().usage.cached_tokens > 0


def test_a_turn_is_cancelled_while_its_file_is_read(
    tmp_path: Path, said: list[Message], disk: Disk
) -> None:
    with open_on(tmp_path, scripted.ANSWERED, concurrent=1) as runtime:
        with runtime.stream(said, sampling=GREEDY) as stream:
            assert disk.begun.wait(30)
        assert next(stream, None) is None
        disk.ready.set()
        wait_until(lambda: not runtime._owner._arriving)
        assert runtime.respond(said, sampling=GREEDY).usage.cached_tokens > 0


def test_closing_while_a_file_is_read_is_told(
    tmp_path: Path, said: list[Message], disk: Disk
) -> None:
    runtime = open_on(tmp_path, scripted.ANSWERED)
    turns = [runtime.stream(said, sampling=GREEDY) for _ in range(4)]
    assert disk.begun.wait(30)
    closing = threading.Thread(target=runtime.close)
    closing.start()
    for turn in turns:
        with pytest.raises(RuntimeClosedError, match="runtime: closed; open another one"):
            turn.reply()
    disk.ready.set()
    closing.join(30)
    assert not closing.is_alive()


def test_a_fault_while_a_file_is_read_is_of_its_turn_alone(
    tmp_path: Path, said: list[Message], disk: Disk
) -> None:
    disk.fault = MemoryError("out of it")
    disk.ready.set()
    with open_on(tmp_path, scripted.ANSWERED) as runtime:
        with pytest.raises(MemoryError, match="out of it"):
            runtime.respond(said, sampling=GREEDY)
        disk.fault = None
        assert runtime.respond(said, sampling=GREEDY).usage.cached_tokens > 0
