"""Conversations as harmony tokens, and the small vocabulary that the demo model is trained on.

A test compares the tokens with those of `mlx_gptoss.harmony`. The text is written out here because
training needs to know which tokens carry the loss, and because a word may be unknown.
"""

import functools
import json
import re
from random import Random

from benchmarks.demo_model import corpus, facts, phrases
from benchmarks.demo_model.corpus import Dialogue, Setting, Turn
from benchmarks.demo_model.dialogues import draw_dialogue, draw_setting
from mlx_gptoss.vocabulary import Special, load_vocabulary

# descriptions of the tools, the first one most often, so that their exact words do not matter
TOOL_WORDINGS = {
    "get_weather": (
        ("Get the weather of a city.", ""),
        ("Get the current weather in a city.", "Name of the city"),
        (f"{phrases.UNKNOWN} the weather{phrases.UNKNOWN}{phrases.UNKNOWN}", ""),
        ("Look up the weather", f"The city, {phrases.UNKNOWN} London"),
    ),
    "add": (
        ("Add two numbers.", ""),
        ("Adds two integers.", f"The {phrases.UNKNOWN} number"),
        (f"{phrases.UNKNOWN} two numbers{phrases.UNKNOWN}{phrases.UNKNOWN}", ""),
        ("Sum of two numbers", ""),
    ),
}
ARGUMENTS = {"get_weather": ("city: string",), "add": ("a: number", "b: number")}
UNKNOWN_ID = -1


_CONTROL = re.compile(r"<\|(start|message|end|channel|constrain|return|call)\|>")


def encode(text: str) -> list[int]:
    """Token ids of harmony text; an unknown word, with the space before it, is UNKNOWN_ID."""
    ids: list[int] = []
    for i, part in enumerate(_CONTROL.split(text)):  # odd parts are names of control tokens
        ids += [Special[part.upper()]] if i % 2 else _encode_words(part)
    return ids


@functools.lru_cache(100_000)
def _encode_words(text: str) -> tuple[int, ...]:
    ids: list[int] = []
    parts = text.replace(f" {phrases.UNKNOWN}", phrases.UNKNOWN).split(phrases.UNKNOWN)
    for i, part in enumerate(parts):
        ids += [UNKNOWN_ID] * (i > 0) + load_vocabulary().encode(part)
    return tuple(ids)


def system_text(setting: Setting) -> str:
    """The system message."""
    date = f"Current date: {setting.date}\n" if setting.date else ""
    tools = (
        "\nCalls to these tools must go to the commentary channel: 'functions'."
        if setting.tools
        else ""
    )
    return (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        f"Knowledge cutoff: 2024-06\n{date}\nReasoning: {phrases.EFFORTS[setting.effort]}\n\n"
        "# Valid channels: analysis, commentary, final. "
        f"Channel must be included for every message.{tools}<|end|>"
    )


def tool_text(tool: str, wording: int) -> str:
    """The declaration of a tool; an empty comment is left out."""
    description, comment = TOOL_WORDINGS[tool][wording]
    comments = f"// {comment}\n" if comment else ""
    arguments = "".join(f"{comments}{argument},\n" for argument in ARGUMENTS[tool])
    return f"// {description}\ntype {tool} = (_: {{\n{arguments}}}) => any;\n"


def developer_text(setting: Setting) -> str:
    """The developer message, empty where there is nothing to say."""
    parts = []
    if setting.instructions:
        parts.append(f"# Instructions\n\n{setting.instructions}")
    if setting.tools:
        tools = "\n".join(tool_text(tool, setting.wording) for tool in setting.tools)
        namespace = f"namespace functions {{\n\n{tools}\n}} // namespace functions"
        parts.append(f"# Tools\n\n## functions\n\n{namespace}")
    body = "\n\n".join(parts)
    return f"<|start|>developer<|message|>{body}<|end|>" if parts else ""


def turn_text(turn: Turn, *, recipient_first: bool) -> str:
    """One message without its opening `<|start|>assistant` where the assistant speaks."""
    if turn.role == "user":
        return f"<|start|>user<|message|>{turn.text}<|end|>"
    if turn.role == "tool":
        header = f"functions.{turn.tool} to=assistant<|channel|>commentary"
        return f"<|start|>{header}<|message|>{turn.text}<|end|>"
    if turn.role == "call":
        to = f" to=functions.{turn.tool}"
        header = f"{to}<|channel|>commentary" if recipient_first else f"<|channel|>commentary{to}"
        return f"{header} <|constrain|>json<|message|>{turn.text}<|call|>"
    end = "<|return|>" if turn.role == "final" and turn.learned else "<|end|>"
    return f"<|channel|>{turn.role}<|message|>{turn.text}{end}"


def prefix_ids(setting: Setting) -> list[int]:
    """Tokens of the system and developer messages."""
    return encode(system_text(setting) + developer_text(setting))


def dialogue_ids(dialogue: Dialogue, rng: Random) -> tuple[list[int], list[bool]]:
    """Tokens of the dialogue, and which of them the model must learn to predict."""
    ids: list[int] = []
    learned: list[bool] = []
    before = False
    for turn in dialogue.turns:
        if turn.role in ("analysis", "final", "call"):
            opening = encode("<|start|>assistant")
            ids += opening
            learned += [turn.learned and before] * len(opening)
        text = turn_text(turn, recipient_first=not turn.learned and rng.random() < 0.5)
        piece = encode(text)
        ids += piece
        learned += [turn.learned] * len(piece)
        before = turn.learned
    return ids, learned


def trained_vocabulary() -> list[int]:
    """Ids of the tokens that get rows of their own, ascending: all that the corpus can say."""
    rng = Random(7)
    strange = re.compile(rf" ?\b({'|'.join(phrases.STRANGE)})\b", re.IGNORECASE)
    used: set[int] = set()
    for _ in range(30_000):
        setting = draw_setting(rng)
        text = system_text(setting) + developer_text(setting)
        for turn in draw_dialogue(rng, setting).turns:
            text += turn_text(turn, recipient_first=rng.random() < 0.5)
        used.update(encode(strange.sub(phrases.UNKNOWN, text)))
    spelled = [f"{n} {n:02d} 20{n:02d}" for n in range(100)]
    spelled += [chr(code) for code in range(32, 127)]
    for fact in corpus.all_facts():  # the held-out ways to ask use known words
        asked = corpus.fill(facts.QUESTIONS[fact.kind][-1], fact)
        spelled += [asked, asked.lower()]
    samples = {"a": 1, "b": "x", "c": [True, False, None, 1.5, "y", {}], "d": {"e": [[]]}}
    spelled += [json.dumps(samples), json.dumps(samples, indent=2)]
    spelled.append(json.dumps(samples, separators=(",", ":")))
    for text in spelled:
        used.update(encode(text))
    return sorted(used - {UNKNOWN_ID})
