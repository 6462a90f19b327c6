"""The runtime: conversations of every form, tools, and what it refuses."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import scripted
from running import GREEDY, open_scripted
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import (
    GptOssError,
    HarmonyError,
    MachineError,
)
from mlx_gptoss.harmony import FinishReason, TextDelta, TurnDone, user
from mlx_gptoss.memory import memory_of
from mlx_gptoss.prefix_cache import MOST_SAVED
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.turn import harmony_engine
from mlx_gptoss.vocabulary import load_vocabulary

CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"


@pytest.fixture
def answering() -> Iterator[tuple[Runtime, scripted.ScriptedModel]]:
    runtime, model = open_scripted(scripted.ANSWERED)
    with runtime:
        yield runtime, model


def test_a_reply_says_everything(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering
    reply = runtime.respond("Two and two?", reasoning="low", instructions="Be brief.",
                            sampling=GREEDY)  # fmt: skip
    assert (reply.text, reply.reasoning) == ("Four, naïvely: 4.", "Two and two.")
    assert reply.tool_calls == () and reply.finish_reason is FinishReason.STOP
    assert reply.usage.prompt_tokens == len(model.prompt)
    assert reply.usage.completion_tokens == len(scripted.tokens_of(scripted.ANSWERED))
    assert reply.timing.ttft_s and reply.timing.decode_tok_per_s
    told = load_vocabulary().decode(model.prompt)
    assert "Reasoning: low" in told and "# Instructions\n\nBe brief.<|end|>" in told
    assert [m.channel for m in reply.messages] == ["analysis", "final"]


def test_a_stream_is_its_reply(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, _ = answering
    with runtime.stream("Hi", sampling=GREEDY) as stream:
        events = list(stream)
    assert events[-1] == TurnDone(FinishReason.STOP) and next(stream, None) is None
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text == stream.reply().text == "Four, naïvely: 4."


def test_a_stream_tells_how_far_the_prompt_is_read(
    answering: tuple[Runtime, scripted.ScriptedModel],
) -> None:
    runtime, model = answering
    told: list[tuple[int, int]] = []
    with runtime.stream("Hi " * 300, on_prefill=lambda *n: told.append(n), max_tokens=1) as stream:
        stream.reply()
    total = len(model.prompt)
    assert told == sorted(told) and len(told) > 2 and told[-1] == (total, total)

    def stop(done: int, total: int) -> None:
        raise KeyError("enough")

    with runtime.stream("Hi " * 301, on_prefill=stop) as stream, pytest.raises(KeyError):
        stream.reply()
    assert runtime.respond("Hi", sampling=GREEDY).text  # the others go on


def test_chat_dictionaries_are_read(answering: tuple[Runtime, scripted.ScriptedModel]) -> None:
    runtime, model = answering
    call = {"id": "c1", "type": "function", "function": {"name": "get-weather", "arguments": "{}"}}
    runtime.respond(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Rain "}, {"text": "today?"}]},
            {"role": "assistant", "content": None, "reasoning": "Look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        ],
        tools=[{"type": "function", "function": {"name": "get-weather", "description": "Sky."}}],
        response_format={"type": "text"},
        sampling=GREEDY,
    )
    told = load_vocabulary().decode(model.prompt)
    assert "Be kind.\n\n# Tools" in told and "type get_weather = () => any;" in told
    assert "// Sky." in told
    assert told.endswith(
        "<|start|>user<|message|>Rain today?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json"
        "<|message|>{}<|call|>"
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sun<|end|>"
        "<|start|>assistant"
    )


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([], {}, "messages: expected one of the user at least, got none"),
        ([{"role": "robot"}], {}, "messages[0].role: expected system, developer, user"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content[0]: expected text, got 3"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            {},
            "messages[0].content[0]: expected text, got {'type': 'image_url'}; gpt-oss reads text",
        ),
        (
            [{"role": "tool", "tool_call_id": "x", "content": ""}],
            {},
            "messages[0].tool_call_id: expected the id of a call before it, got 'x'",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "no"}}]}],
            {},
            "tool 'no': expected one of []",
        ),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            {},
            "messages[0].tool_calls[0].function.name: expected the name of a tool, got {}",
        ),
        ("Hi", {"reasoning": "huge"}, "reasoning: expected one of low, medium, high; got 'huge'"),
        ("Hi", {"tools": [{"type": "magic"}]}, 'tools[0]: expected {"type": "function"'),
        (
            "Hi",
            {"response_format": {"type": "json_object"}},
            'response_format: expected {"type": "text"} or {"type": "json_schema"',
        ),
    ],
)
def test_what_cannot_be_understood_is_refused_at_once(
    answering: tuple[Runtime, scripted.ScriptedModel],
    messages: Any,
    options: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(HarmonyError, match=re.escape(says)):
        answering[0].stream(messages, **options)


class Rounds(scripted.ScriptedModel):
    """Writes the next of its scripts after each prompt."""

    def __init__(self, scripts: list[str]) -> None:
        super().__init__("")
        self.scripts = scripts

    def next_logits(self, tokens: mx.array, cache: Any) -> mx.array:
        if tokens.shape[1] > 1:
            self.script = self.scripts.pop(0)
        return super().next_logits(tokens, cache)


def test_functions_are_called_and_their_answers_told() -> None:
    seen: list[tuple[str, int]] = []

    def look(place: str, days: int = 1) -> dict[str, str]:
        """Look at the sky."""
        seen.append((place, days))
        return {"sky": "blue"}

    good, wrong = CALL.format("look", '{"place": "Rome", "days": 2}'), CALL.format("look", "{}")
    model = Rounds([good, wrong, scripted.ANSWERED, good, wrong])
    with Runtime(lambda: harmony_engine(model)) as runtime:  # type: ignore[arg-type]
        run = runtime.run_tools("Sky?", [look], sampling=GREEDY)
        assert seen == [("Rome", 2)] and run.reply.text == "Four, naïvely: 4."
        told = load_vocabulary().decode(model.prompt)
        assert 'commentary<|message|>{"sky": "blue"}<|end|>' in told
        assert "<|message|>Error: TypeError: " in told and "'place'<|end|>" in told
        assert "// Look at the sky.\ntype look = (_: {\nplace: string,\ndays?: " in told
        assert [m.role for m in run.messages] == ["assistant", "tool"] * 2 + ["assistant"] * 2
        cut = runtime.run_tools("Sky?", [look], max_rounds=2, sampling=GREEDY)
        assert len(cut.reply.tool_calls) == 1 and len(cut.messages) == 3
        with pytest.raises(ValueError, match="max_rounds: expected a number >= 1, got 0"):
            runtime.run_tools("Sky?", [look], max_rounds=0)

        def bad(place: bytes) -> None: ...

        with pytest.raises(HarmonyError, match=r"bad\(place\): expected an annotation of str, int"):
            runtime.run_tools("Sky?", [bad])


def test_messages_of_ours_say_everything_themselves(
    answering: tuple[Runtime, scripted.ScriptedModel],
) -> None:
    from mlx_gptoss.harmony import DeveloperContent, SystemContent, developer, system

    runtime, model = answering
    head = [system(SystemContent(date=None)), developer(DeveloperContent(instructions="Sing."))]
    runtime.respond([*head, user("Hi")], sampling=GREEDY)
    told = load_vocabulary().decode(model.prompt)
    assert "Current date" not in told and "Sing." in told
    with pytest.raises(HarmonyError, match=r"messages\[0\]: a system message of your own says"):
        runtime.respond([*head, user("Hi")], reasoning="low")
    with pytest.raises(HarmonyError, match="expected a user's after your own system message"):
        runtime.respond(head)


UNIT = {"anyOf": [{"type": "string", "enum": ["C", "F"]}, {"type": "null"}]}
LOOK = {"name": "look", "parameters": {"type": "object", "properties": {"unit": UNIT}}}


@pytest.mark.parametrize(
    ("tool_schemas", "told"), [("openai", "unit?: any,"), ("resolved", 'unit?: "C" | "F" | null,')]
)
def test_parameters_of_tools_are_told_in_either_way(tool_schemas: str, told: str) -> None:
    runtime, model = open_scripted(scripted.ANSWERED, tool_schemas=tool_schemas)
    with runtime:
        runtime.respond("Hi", tools=[{"type": "function", "function": LOOK}], sampling=GREEDY)
    assert told in load_vocabulary().decode(model.prompt)


def test_what_loading_raises_is_raised_by_open() -> None:
    def load() -> Any:
        raise GptOssError("no such thing")

    with pytest.raises(GptOssError, match="no such thing"):
        Runtime(load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    convert_checkpoint(write_checkpoint(path / "source", layers=2), path / "model")
    return path / "model"


def test_open_finds_loads_and_frees(folder: Path) -> None:
    """The tiny model has another vocabulary, which is told when it is opened."""
    with pytest.raises(GptOssError, match="vocab_size: expected 201088"):
        Runtime.open(str(folder))
    with pytest.raises(MachineError, match="memory: the model with a context"):
        Runtime.open(str(folder), memory_limit_bytes=1000)
    with pytest.raises(ValueError, match="concurrent: expected 1 to 16, got 0"):
        Runtime.open(str(folder), concurrent=0)
    with pytest.raises(ValueError, match="tool_schemas: expected openai or resolved, got 'json'"):
        Runtime.open(str(folder), tool_schemas="json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache_bytes: expected a number >= 0, got -1"):
        Runtime.open(str(folder), cache_bytes=-1)


def test_what_does_not_fit_is_refused_with_numbers(folder: Path) -> None:
    with pytest.raises(
        MachineError,
        match=r"memory: the model with a context of 1024 tokens needs 0\.0\d GiB, this machine "
        r"lets 0\.00 GiB be used; see `mlx-gptoss plan`",
    ):
        memory_of(folder, limit_bytes=2**20)
    memory = memory_of(folder, limit_bytes=160 * 2**20)
    assert memory is not None and 1024 < memory.longest < 131_072
    assert memory.grant(100, None) == (memory.longest, memory.longest - 100)
    assert memory.grant(100, 50) == (150, 50)
    with pytest.raises(
        MachineError,
        match=rf"memory: 100 prompt tokens with max_tokens=131000 need \d\.\d\d GiB, this machine "
        rf"lets 0\.16 GiB be used, enough for {memory.longest} tokens in all; lower max_tokens",
    ):
        memory.grant(100, 131_000)
    assert memory.free_bytes([memory.longest]) >= 0 > memory.free_bytes([memory.longest] * 2)
    assert memory.free_bytes([]) > 0
    one, two = (replace(memory._plan, context=context) for context in (700, 2000))
    most = max(
        one.decode_bytes + two.decode_bytes,
        one.decode_bytes + two.prefill_bytes,
        one.prefill_bytes + two.decode_bytes,
    )
    assert one.snapshots == MOST_SAVED
    stays = sum(plan.kv_bytes + plan.snapshots * plan.snapshot_bytes for plan in (one, two))
    taken = memory.free_bytes([]) - memory.free_bytes([700, 2000])
    assert taken == stays + most, "one is fed while the other decodes"
    unlimited = memory_of(folder, limit_bytes=None)
    assert unlimited is None or unlimited.longest == 131_072
