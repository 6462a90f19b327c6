"""How runtimes end: with the process, amid opening, and where the device fails."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import scripted
from running import GREEDY, LONG, open_model, open_scripted, wait_until

from mlx_gptoss.cache_folder import CacheFolder
from mlx_gptoss.engine import Generation
from mlx_gptoss.errors import RuntimeClosedError
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.turn import harmony_engine

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("closes", [False, True])
def test_an_app_ends_amid_a_turn(closes: bool) -> None:
    """Python ended the thread within MLX, which aborted the process.

    Closing in the thread itself cannot wait for its end either.
    """
    code = (
        "from mlx_gptoss import Runtime\n"
        "runtime = Runtime.open('demo')\n"
        f"told = {'lambda *_: runtime.close()' if closes else None}\n"
        "turn = runtime.stream('Tell me a long story.', on_prefill=told)\n"
        "for _, event in zip(range(2), [] if told else turn): print(type(event).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == (0 if closes else 2)


def test_opening_that_is_interrupted_keeps_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread waited for turns for ever, with the model in memory."""
    threads, gone = [], threading.Event()

    class Loaded:
        def result(self) -> None:
            raise KeyboardInterrupt

        def set_result(self, _: None) -> None:
            pass

    def load() -> Any:
        threads.append(threading.current_thread())
        gone.wait(30)
        model: Any = scripted.ScriptedModel(LONG)
        return harmony_engine(model)

    monkeypatch.setattr("mlx_gptoss.owner.Future", Loaded)
    with pytest.raises(KeyboardInterrupt):
        Runtime(load)
    gone.set()
    wait_until(lambda: threads and not threads[0].is_alive())


def test_a_cache_that_cannot_be_made_is_told_by_open(tmp_path: Path) -> None:
    """Whoever opened the runtime waited for ever."""
    model = scripted.ScriptedModel(LONG)

    def fail() -> Any:
        raise MemoryError("out of it")

    model.make_cache = fail
    with pytest.raises(MemoryError, match="out of it"):
        open_model(model, files=lambda _: CacheFolder(tmp_path, identity="0" * 16))


def test_a_device_that_fails_at_the_end_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first turn's fault hid the end from the readers of all, and nothing was freed."""
    runtime, _ = open_scripted(LONG, concurrent=2)
    turns = [runtime.stream("Hi", sampling=GREEDY) for _ in range(3)]
    next(turns[0])

    def fail(self: Generation) -> None:
        raise RuntimeError("command buffer: failed")

    monkeypatch.setattr(Generation, "close", fail)
    runtime.close()
    for turn in turns:
        with pytest.raises(RuntimeClosedError, match="runtime: closed; open another one"):
            turn.reply()
    assert not hasattr(runtime._owner, "_prefixes")
    [record] = caplog.records
    assert record.message == "the runtime could not end the work that was begun"
