"""Turns and the memory: what is reserved, refused and waited for, and what idle caches give up."""

from functools import partial
from pathlib import Path

import pytest
import scripted
from running import GREEDY, LONG, open_scripted
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.harmony import user
from mlx_gptoss.harmony.ledger import Prompt
from mlx_gptoss.memory import Memory, memory_of
from mlx_gptoss.prefix_cache import PrefixCache


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
        assert second.reply().usage.completion_tokens == 5
        assert first._outbox.is_full, "it went on to its end, though nobody reads it"
        assert {first.reply().text, third.reply().text} == {"word " * 400}


def test_a_conversation_that_reserves_all_memory_goes_on_from_its_cache(folder: Path) -> None:
    """Its own cache was given up to make room for it, so that each turn read all of its prompt."""
    limit_bytes, memory = 160 * 2**20, None
    for _ in range(2):
        memory = memory_of(folder, limit_bytes=limit_bytes)
        assert memory is not None and memory.longest < 131_072
        limit_bytes -= memory.free_bytes([memory.longest])
    assert memory is not None and memory.free_bytes([memory.longest]) == 0
    runtime, _ = open_scripted(scripted.ANSWERED, admission=memory)
    with runtime:
        one, other = ([user(f"Hello, I am {name}.")] for name in ("one", "the other"))
        for messages in (one, other):
            messages += runtime.respond(messages, sampling=GREEDY).messages
        going_on = runtime.respond([*other, user("And?")], sampling=GREEDY).usage
        assert going_on.cached_tokens > going_on.prompt_tokens / 2
        begun = runtime.respond([*one, user("And?")], sampling=GREEDY).usage
        assert begun.cached_tokens < going_on.cached_tokens, "this one made room for the other"


def test_what_is_kept_of_a_turn_counts_where_it_is_more_than_reserved() -> None:
    """A short question that goes back in a long conversation."""
    prefixes = PrefixCache(scripted.ScriptedCache, budget_bytes=2**30)
    tokens = tuple(range(5000))
    slot = prefixes.take(Prompt(tokens=tokens, ends=(), stable=4000), head=10)
    assert isinstance(slot.cache, scripted.ScriptedCache)
    slot.cache.count(4000)
    slot.note(tokens)
    prefixes.give_back(slot)
    room = partial(prefixes.make_room, tokens, budget_bytes=0)
    room(turn_bytes=slot.nbytes)
    assert prefixes._idle == [slot]
    room(turn_bytes=slot.nbytes - 1)
    assert not prefixes._idle
