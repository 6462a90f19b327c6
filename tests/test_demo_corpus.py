"""The generator of the demo model's training data: its tokens, its consistency, its vocabulary."""

import hashlib
import json
from random import Random

import pytest

from benchmarks.demo_model import cases, corpus, facts, phrases, questions, render
from benchmarks.demo_model.corpus import Dialogue, Setting
from benchmarks.demo_model.dialogues import draw_dialogue, draw_setting
from mlx_gptoss.demo import TOKEN_IDS, read_compact
from mlx_gptoss.harmony import (
    Channel,
    DeveloperContent,
    Message,
    OldAnalysis,
    ReasoningEffort,
    RenderOptions,
    SystemContent,
    ToolDescription,
    assistant,
    developer,
    function_tools,
    render_conversation_for_training,
    system,
    tool_call,
    tool_result,
    user,
)


def draw(seed: int, count: int) -> list[tuple[Setting, Dialogue]]:
    rng = Random(seed)
    settings = [draw_setting(rng) for _ in range(count)]
    return [(setting, draw_dialogue(rng, setting)) for setting in settings]


def described(tool: str, wording: int) -> ToolDescription:
    description, comment = render.TOOL_WORDINGS[tool][wording]
    fields = dict(argument.split(": ") for argument in render.ARGUMENTS[tool])
    note = {"description": comment} if comment else {}
    properties = {name: {"type": kind, **note} for name, kind in fields.items()}
    schema = {"type": "object", "properties": properties, "required": list(fields)}
    return ToolDescription(name=tool, description=description, parameters=schema)


def as_messages(setting: Setting, dialogue: Dialogue) -> list[Message]:
    """The conversation in the words of our own harmony layer."""
    effort = list(ReasoningEffort)[setting.effort]
    messages = [system(SystemContent(date=setting.date, effort=effort))]
    if setting.instructions or setting.tools:
        tools = tuple(described(tool, setting.wording) for tool in setting.tools)
        namespaces = (function_tools(*tools),) if tools else ()
        content = DeveloperContent(instructions=setting.instructions, tools=namespaces)
        messages.append(developer(content))
    for turn in dialogue.turns:
        match turn.role:
            case "user":
                messages.append(user(turn.text))
            case "tool":
                messages.append(tool_result(f"functions.{turn.tool}", turn.text))
            case "call":
                messages.append(tool_call(f"functions.{turn.tool}", turn.text))
            case channel:
                messages.append(assistant(turn.text, channel=Channel(channel)))
    return messages


def test_tokens_are_those_of_the_harmony_layer() -> None:
    options = RenderOptions(old_analysis=OldAnalysis.KEEP)
    compared = 0
    for setting, dialogue in draw(3, 600):
        text = render.system_text(setting) + render.developer_text(setting)
        for turn in dialogue.turns:
            opening = "<|start|>assistant" * (turn.role in ("analysis", "final", "call"))
            text += opening + render.turn_text(turn, recipient_first=True)
        if phrases.UNKNOWN in text:
            continue
        compared += 1
        messages = as_messages(setting, dialogue)
        assert render.encode(text) == render_conversation_for_training(messages, options=options)
    assert compared > 300


def test_what_is_learned_is_what_the_model_says() -> None:
    """The loss covers the reply from its channel on, and the opening of a message that follows."""
    dialogue = Dialogue(
        "capital",
        (
            corpus.Turn("user", "Hi"),
            corpus.Turn("analysis", "Yes.", learned=True),
            corpus.Turn("final", "Paris.", learned=True),
        ),
    )
    ids, learned = render.dialogue_ids(dialogue, Random(0))
    wanted = "<|channel|>analysis<|message|>Yes.<|end|><|start|>assistant<|channel|>final"
    wanted += "<|message|>Paris.<|return|>"
    taught = [token for token, wanted in zip(ids, learned, strict=True) if wanted]
    assert taught == render.encode(wanted)
    assert ids == render.encode("<|start|>user<|message|>Hi<|end|><|start|>assistant") + taught


@pytest.mark.parametrize("tools", [(), *sorted(set(phrases.TOOL_SETS))])
def test_the_same_prompt_has_one_reply(tools: tuple[str, ...]) -> None:
    """In one setting, so that many prompts come up more than once."""
    rng = Random(4)
    setting = Setting(1, None, tools, None)
    replies: dict[object, object] = {}
    repeated = 0
    for _ in range(4000):
        heard: tuple[object, ...] = ()
        for turn in draw_dialogue(rng, setting).turns:
            said = (turn.role, turn.text, turn.tool)
            if turn.learned:
                repeated += heard in replies
                assert replies.setdefault(heard, said) == said, heard
            heard += ((turn.role, turn.text),)
    assert repeated > 300


def test_every_reply_can_be_written_with_the_trained_tokens() -> None:
    trained = {int(token) for token in read_compact()[TOKEN_IDS]}
    for setting, dialogue in draw(5, 600):
        assert set(render.encode(render.system_text(setting))) <= trained
        ids, learned = render.dialogue_ids(dialogue, Random(0))
        said = {token for token, wanted in zip(ids, learned, strict=True) if wanted}
        assert said <= trained, [turn.text for turn in dialogue.turns if turn.learned]
    assert set(render.encode(json.dumps({"city": "Paris", "a": 1}))) <= trained
    for word in ("Mongolia", "quantum", "bicycle"):
        assert not set(render.encode(f" {word}")) <= trained


def test_the_generator_is_the_one_that_trained_the_model() -> None:
    """The same seed gives the conversations of the training run."""
    text = repr(draw(20261121, 200))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "37902e29aae2f8a6570bf4a128981dd31e379170d5a914f2eb30fda2bbeed3a5"
    )


@pytest.mark.parametrize("kind", list(facts.QUESTIONS))
def test_held_out_wordings_are_never_drawn(kind: str) -> None:
    rng = Random(6)
    held_out = facts.QUESTIONS[kind][-1].split("{")[0].strip()
    trained = [template.split("{")[0].strip() for template in facts.QUESTIONS[kind][:-1]]
    assert held_out not in trained
    for _ in range(200):
        fact = corpus.draw_fact(rng, kind)
        assert corpus.question(fact, rng) != corpus.fill(facts.QUESTIONS[kind][-1], fact)


def test_the_questions_are_many_and_differ() -> None:
    asked = [q for pairs in questions.TRAINED.values() for q, _ in pairs]
    assert len(set(asked)) == len(asked) >= 130
    everything = list(cases.cases())
    assert len(everything) >= 250
    assert {c.call[1]["city"] for c in everything if c.kind == "weather call" and c.call} == set(
        phrases.CITIES
    )
