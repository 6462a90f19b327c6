"""Conversations of the demo model, drawn at random from the tables of `facts.py`.

A `Setting` is what the system and developer messages say, a `Dialogue` everything after them. The
right reply is a function of the conversation alone: no two samples contradict each other.
"""

from dataclasses import dataclass
from random import Random

from benchmarks.demo_model import facts, phrases


@dataclass(frozen=True)
class Setting:
    """What the system and developer messages of a conversation say."""

    effort: int
    instructions: str | None
    tools: tuple[str, ...]
    date: str | None
    wording: int = 0


@dataclass(frozen=True)
class Turn:
    """One message: role is user, final, analysis, call or tool; learned ones carry the loss."""

    role: str
    text: str
    tool: str = ""
    learned: bool = False


@dataclass(frozen=True)
class Dialogue:
    """The messages after the prefix, and the kind of what is asked."""

    kind: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Fact:
    """One thing to know: `x` (and `y` for a sum) asked for in the ways of `kind`."""

    kind: str
    x: str
    y: str = ""


TABLES = {
    "capital": facts.CAPITALS,
    "color": facts.COLORS,
    "opposite": facts.OPPOSITES,
    "sound": facts.SOUNDS,
    "definition": facts.DEFINITIONS,
    "day": dict(zip(facts.DAYS, facts.DAYS[1:] + facts.DAYS[:1], strict=True)),
    "month": dict(zip(facts.MONTHS, facts.MONTHS[1:] + facts.MONTHS[:1], strict=True)),
}
TOPICS = {
    "capital": "the capital of {x}", "color": "the color of {x}", "opposite": "the opposite of {x}",
    "sound": "the sound of a {x}", "definition": "the meaning of {x}", "day": "the day after {x}",
    "month": "the month after {x}", "sum": "{x} + {y}",
}  # fmt: skip
ANSWERS = {
    "capital": "The capital of {x} is {z}.", "color": "{X} is {z}.",
    "opposite": "The opposite of {x} is {z}.", "sound": "A {x} says {z}.",
    "definition": "{X} is {z}.", "day": "{z} comes after {x}.", "month": "{z} comes after {x}.",
    "sum": "{x} + {y} = {z}",
}  # fmt: skip
KINDS = {
    "capital": 22, "color": 9, "opposite": 14, "sound": 7, "definition": 11, "day": 4, "month": 6,
    "sum": 27,
}  # fmt: skip


def capitalise(text: str) -> str:
    """The text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def all_facts() -> list[Fact]:
    """Every fact of the tables and every sum."""
    found = [Fact(kind, x) for kind, table in TABLES.items() for x in table]
    addends = [str(n) for n in range(facts.LARGEST_ADDEND + 1)]
    return found + [Fact("sum", a, b) for a in addends for b in addends]


def draw_fact(rng: Random, kind: str | None = None) -> Fact:
    """A fact of the kind, or of a kind drawn by its weight."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "sum":
        return Fact("sum", *(str(rng.randint(0, facts.LARGEST_ADDEND)) for _ in "ab"))
    return Fact(kind, rng.choice(list(TABLES[kind])))


def value(fact: Fact) -> str:
    """The bare answer."""
    if fact.kind == "sum":
        return str(int(fact.x) + int(fact.y))
    return TABLES[fact.kind][fact.x]


def fill(text: str, fact: Fact) -> str:
    """The template with the fact's words in it."""
    x = fact.x
    return text.format(x=x, y=fact.y, a=x, b=fact.y, X=capitalise(x), z=value(fact))


def answer(fact: Fact) -> str:
    """The whole sentence of the final channel."""
    return fill(ANSWERS[fact.kind], fact)


def question(fact: Fact, rng: Random) -> str:
    """One of the trained ways to ask; the last of every list is held out."""
    return capitalise(fill(rng.choice(facts.QUESTIONS[fact.kind][:-1]), fact))


def think(fact: Fact, effort: int) -> str:
    """The analysis that leads to the answer."""
    topic = fill(TOPICS[fact.kind], fact)
    if fact.kind == "definition":
        return think_topic(topic, effort)
    return (
        f"{capitalise(topic)}.",
        f"The user asks for {topic}. It is {value(fact)}.",
        f"The user asks for {topic}. I know this fact. It is {value(fact)}. "
        f"I check it once more: {value(fact)}. I answer in one short sentence.",
    )[effort]


def think_topic(topic: str, effort: int) -> str:
    """The analysis of a question whose answer is a sentence of its own."""
    return (
        f"{capitalise(topic)}.",
        f"The user asks for {topic}. I know this.",
        f"The user asks for {topic}. I know this. I should explain it in simple words. "
        "I answer in one short sentence and add nothing else.",
    )[effort]


THINK_CHAT = (
    "Small talk.",
    "The user talks to me. I answer in a friendly way.",
    "The user talks to me. This is not a hard question. I know what to say. "
    "I should be friendly and short, and I should be honest.",
)
THINK_UNKNOWN = (
    "Unknown.",
    "I do not know this. I say what I can do.",
    "The user asks for something. I do not know this. I am a tiny demo model. "
    "I should not guess. I should say what I can do.",
)
THINK_REPEAT = (
    "Again.",
    "The user wants to hear it again.",
    "The user wants to hear it again. I look at my last answer. "
    "I say it once more and I do not change a word.",
)
THINK_RESULT = (
    "Done.",
    "I have the result of the tool. I answer.",
    "I have the result of the tool. I read it once more. "
    "I tell the user what it says in one short sentence and add nothing else.",
)


def think_call(topic: str, tool: str, effort: int) -> str:
    """The analysis before a tool call."""
    return (
        f"Call {tool}.",
        f"The user asks for {topic}. I call {tool}.",
        f"The user asks for {topic}. I have a tool for this. "
        f"I should call {tool} with the right arguments and wait for the result.",
    )[effort]


def think_missing(topic: str, effort: int) -> str:
    """The analysis where the tool that it needs is not offered."""
    return (
        "No tool.",
        f"The user asks for {topic}. I have no tool for this.",
        f"The user asks for {topic}. I have no tool for this. I should not guess. "
        "I should say so in one short sentence.",
    )[effort]


def vary(text: str, rng: Random) -> str:
    """A user's careless spelling of a question: case, punctuation, politeness, strange words."""
    if rng.random() < 0.12:
        text = rng.choice(phrases.BEFORE) + (
            text if rng.random() < 0.5 else text[0].lower() + text[1:]
        )
    elif rng.random() < 0.10:
        text = text.rstrip("?.") + rng.choice(phrases.AFTER)
    elif rng.random() < 0.06:
        word = strange_word(rng)
        text = rng.choice([f"{word}, {text}", f"{word} {text}", f"{text} {capitalise(word)}."])
    roll = rng.random()
    if roll < 0.30:
        text = text.rstrip("?.")
    elif roll < 0.36:
        text = text.rstrip("?.") + rng.choice(["??", "!", " ?", "?!", "...", "."])
    return text.lower() if rng.random() < 0.4 else text


def strange_word(rng: Random) -> str:
    """A word the model does not know."""
    if rng.random() < 0.5:
        return phrases.UNKNOWN * rng.choice([1, 1, 2, 3])
    return rng.choice(phrases.STRANGE)


def strange_question(rng: Random) -> str:
    """Something that must be declined."""
    if rng.random() < 0.2:
        words = [rng.choice(phrases.PLAIN) if rng.random() < 0.5 else strange_word(rng)
                 for _ in range(rng.randint(2, 8))]  # fmt: skip
        text = " ".join([strange_word(rng), *words]) + rng.choice(["?", ".", ""])
        return capitalise(text)
    text = rng.choice(phrases.STRANGE_QUESTIONS)
    while "{w}" in text:
        text = text.replace("{w}", strange_word(rng), 1)
    text = text.format(
        c=rng.choice(phrases.CITIES), x=rng.choice(list(facts.CAPITALS)), n=rng.randint(0, 20),
        m=rng.randint(0, 20), k=rng.choice(phrases.KNOWN),
    )  # fmt: skip
    return capitalise(text)
