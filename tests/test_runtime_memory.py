"""Turns and the memory: what is reserved, refused and waited for, and what idle caches give up."""

from pathlib import Path

import pytest
import scripted
from running import GREEDY, LONG, open_scripted, wait_until
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.harmony import FinishReason
from mlx_gptoss.memory import Memory, memory_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    convert_checkpoint(write_checkpoint(path / "source", layers=2), path / "model")
    return path / "model"


@pytest.mark.parametrize("max_tokens", [0, -1, -1000])
def test_a_wrong_max_tokens_is_refused_at_once(folder: Path, max_tokens: int) -> None:
    """Beside admission 0 was taken for 1, and -1000 ended the runtime."""
    runtime, _ = open_scripted(scripted.ANSWERED, admission=memory_of(folder, limit_bytes=2**28))
    with runtime:
        with pytest.raises(ValueError, match="max_tokens: expected a whole number >= 1 or None"):
            runtime.stream("Hi", max_tokens=max_tokens)
        assert runtime.respond("Hi", sampling=GREEDY).text


def test_what_admission_raises_is_of_its_turn_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = open_scripted(scripted.ANSWERED, admission=memory_of(folder, limit_bytes=2**28))

    def broken(self: Memory, contexts: list[int]) -> int:
        raise MemoryError("out of it")

    with runtime:
        with monkeypatch.context() as patch:
            patch.setattr(Memory, "free_bytes", broken)
            with pytest.raises(MemoryError, match="out of it"):
                runtime.respond("Hi", sampling=GREEDY)
        assert runtime.respond("Hi", sampling=GREEDY).text


def test_turns_wait_for_memory_and_idle_conversations_make_room(folder: Path) -> None:
    memory = memory_of(folder, limit_bytes=160 * 2**20)
    assert isinstance(memory, Memory)
    runtime, _ = open_scripted(LONG, admission=memory)
    with runtime:
        first = runtime.stream("Hi", sampling=GREEDY)
        next(first)
        second = runtime.stream("Hi", sampling=GREEDY, max_tokens=5)
        third = runtime.stream("Hi", sampling=GREEDY)  # reserves all there is, as the first does
        wait_until(lambda: first._outbox.is_full)
        assert len(runtime._owner._running) == 1
        first.close()
        assert second.reply().usage.completion_tokens == 5
        assert third.reply().finish_reason is FinishReason.STOP
