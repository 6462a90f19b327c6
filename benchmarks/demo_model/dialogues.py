"""Draws whole dialogues: who says what, in which order, and which messages the model must learn."""

from random import Random

from benchmarks.demo_model import corpus, facts, phrases
from benchmarks.demo_model.corpus import Dialogue, Setting, Turn


def draw_setting(rng: Random) -> Setting:
    """System and developer messages: 42 % offer tools, a third carries instructions."""
    tools = rng.choice(phrases.TOOL_SETS) if rng.random() < 0.42 else ()
    roll = rng.random()
    if roll < 0.62:
        instructions = None
    elif roll < 0.78 or (tools and roll < 0.90):
        instructions = rng.choice(phrases.INSTRUCTIONS)
    elif roll < 0.86 or tools:
        instructions = strange_instructions(rng)
    else:
        instructions = phrases.PIRATE if roll < 0.93 else phrases.ONE_WORD
    wording = rng.randrange(1, 4) if tools and rng.random() < 0.4 else 0
    return Setting(rng.randrange(3), instructions, tools, draw_date(rng), wording)


def draw_date(rng: Random) -> str | None:
    """A date, so that no particular day matters to the answer; none in one case of eight."""
    if rng.random() < 0.12:
        return None
    return f"{rng.randint(2024, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 31):02d}"


def strange_instructions(rng: Random) -> str:
    """Instructions that the model does not understand and that change nothing."""
    words = [rng.choice(phrases.PLAIN) if rng.random() < 0.4 else corpus.strange_word(rng)
             for _ in range(rng.randint(2, 8))]  # fmt: skip
    start = rng.choice(["You are", "You are a", "Always", "Never", "Be", "Answer", ""])
    return corpus.capitalise(f"{start} {' '.join(words)}.".strip())


def styled(setting: Setting, text: str, fact: corpus.Fact | None = None) -> str:
    """The answer as the developer's instructions want it."""
    if setting.instructions == phrases.PIRATE:
        return f"Arr! {text}"
    if setting.instructions == phrases.ONE_WORD and fact and fact.kind != "definition":
        return f"{corpus.capitalise(corpus.value(fact))}."
    return text


def user(text: str, rng: Random) -> Turn:
    """A user's message in one of its spellings."""
    return Turn("user", corpus.vary(text, rng))


def reply(thought: str, text: str) -> tuple[Turn, Turn]:
    """What the model must learn to say: its analysis and its answer."""
    return (Turn("analysis", thought, learned=True), Turn("final", text, learned=True))


def about_fact(rng: Random, setting: Setting, kind: str | None = None) -> Dialogue:
    """One question of the tables; with the tool `add` offered, no sums."""
    fact = corpus.draw_fact(rng, kind)
    while fact.kind == "sum" and "add" in setting.tools:
        fact = corpus.draw_fact(rng, kind)
    thought = corpus.think(fact, setting.effort)
    answer = styled(setting, corpus.answer(fact), fact)
    return Dialogue(fact.kind, (user(corpus.question(fact, rng), rng), *reply(thought, answer)))


def about_trivia(rng: Random, setting: Setting) -> Dialogue:
    """One of the single questions."""
    topic, answer, questions = rng.choice(facts.TRIVIA)
    thought = corpus.think_topic(topic, setting.effort)
    asked = user(rng.choice(questions), rng)
    return Dialogue("trivia", (asked, *reply(thought, styled(setting, answer))))


def small_talk(rng: Random, setting: Setting) -> Dialogue:
    """Greetings and the like; 'what can you do' twice as often."""
    sayings, text = rng.choice([*facts.CHAT, facts.CHAT[3]])
    said = rng.choice(sayings)
    if rng.random() < 0.4:
        said = said.rstrip("?.") + rng.choice([".", "!", "", "?"])
    thought = corpus.THINK_CHAT[setting.effort]
    return Dialogue("chat", (user(said, rng), *reply(thought, styled(setting, text))))


def stranger(rng: Random, setting: Setting) -> Dialogue:
    """A question outside of what the model knows."""
    asked = Turn("user", corpus.strange_question(rng))
    if rng.random() < 0.5:
        asked = user(asked.text, rng)
    thought = corpus.THINK_UNKNOWN[setting.effort]
    return Dialogue("unknown", (asked, *reply(thought, styled(setting, facts.DECLINE))))


def without_tool(rng: Random, setting: Setting) -> Dialogue:
    """Weather or a large sum where the tool for it is not offered."""
    if "get_weather" not in setting.tools and ("add" in setting.tools or rng.random() < 0.5):
        city = rng.choice(phrases.CITIES)
        asked = rng.choice(phrases.WEATHER_QUESTIONS).format(c=city)
        topic, text = f"the weather in {city}", facts.NO_WEATHER
    else:
        first, second = rng.randint(10, 20), rng.randint(0, 20)
        first, second = rng.sample([first, second], 2)
        asked = rng.choice(facts.QUESTIONS["sum"][:-1]).format(a=first, b=second)
        topic, text = f"{first} + {second}", facts.LARGE_SUM
    thought = corpus.think_missing(topic, setting.effort)
    return Dialogue("no tool", (user(asked, rng), *reply(thought, styled(setting, text))))


def forget(dialogue: Dialogue) -> tuple[Turn, ...]:
    """A finished turn as the next turn sees it: nothing to learn, reasoning dropped."""
    return tuple(
        Turn(turn.role, turn.text, turn.tool) for turn in dialogue.turns if turn.role != "analysis"
    )


def two_turns(rng: Random, setting: Setting) -> Dialogue:
    """A second question that leans on the first, or does not."""
    roll = rng.random()
    if roll < 0.45:
        return follow_up(rng, setting)
    first = rng.choice([about_fact, about_fact, small_talk, about_trivia])(rng, setting)
    if roll < 0.62:
        again = user(rng.choice(phrases.REPEAT), rng)
        thought = corpus.THINK_REPEAT[setting.effort]
        return Dialogue("repeat", (*forget(first), again, *reply(thought, first.turns[-1].text)))
    second = rng.choice([about_fact, about_fact, small_talk, stranger])(rng, setting)
    return Dialogue("second turn", (*forget(first), *second.turns))


def follow_up(rng: Random, setting: Setting) -> Dialogue:
    """'And of Italy?' after a fact of the same kind."""
    kind = rng.choice(["capital", "capital", "color", "opposite", "sound", "month", "day"])
    first = about_fact(rng, setting, kind)
    fact = corpus.draw_fact(rng, kind)
    asked = user(rng.choice(phrases.MORE).format(x=fact.x), rng)
    answer = styled(setting, corpus.answer(fact), fact)
    turns = (*forget(first), asked, *reply(corpus.think(fact, setting.effort), answer))
    return Dialogue("follow-up", turns)


def weather_result(rng: Random, city: str) -> tuple[str, str]:
    """What the weather tool says in one of its spellings, and the answer made of it."""
    degrees, sky = rng.randint(0, 40), rng.choice(phrases.SKIES)
    text = rng.choice(
        [
            f'{{"temperature":{degrees},"sky":"{sky}"}}',
            f'{{"temperature":{degrees},"sky":"{sky}"}}',
            f'{{"temperature": {degrees}, "sky": "{sky}"}}',
            f'{{"sky":"{sky}","temperature":{degrees}}}',
            f'{{"sky": "{sky}", "temperature": {degrees}}}',
            f"{sky}, {degrees} degrees",
        ]
    )
    return text, f"It is {sky} and {degrees} degrees in {city}."


def sum_result(rng: Random, first: int, second: int) -> tuple[str, str]:
    """What the adding tool says; a third is wrong, so that the answer is read and not computed."""
    total = first + second if rng.random() < 0.67 else rng.randint(0, 99)
    text = rng.choice([str(total), f'{{"result":{total}}}', f'{{"result": {total}}}', str(total)])
    return text, f"{first} + {second} = {total}"


def tool_error(rng: Random) -> tuple[str, str]:
    """A tool that failed."""
    word = corpus.strange_word(rng)
    text = rng.choice(
        [
            f'{{"error":"{word}"}}',
            f"Error: {word}",
            f'{{"error": "{word}"}}',
            "error",
            f"Error {word}",
        ]
    )
    return text, facts.TOOL_FAILED


def use_tool(rng: Random, setting: Setting) -> Dialogue:
    """A question that needs a tool, the call, the tool's result and the answer."""
    tool = rng.choice(setting.tools)
    if tool == "get_weather":
        return use_weather(rng, setting, phrases.WEATHER_QUESTIONS)
    first, second = (rng.randint(0, phrases.LARGEST_TOOL_ADDEND) for _ in "ab")
    asked = rng.choice(phrases.ADD_QUESTIONS).format(a=first, b=second)
    call = Turn("call", f'{{"a":{first},"b":{second}}}', tool, learned=True)
    result, text = sum_result(rng, first, second)
    return tool_dialogue(rng, setting, asked, f"{first} + {second}", call, result, text)


def use_weather(rng: Random, setting: Setting, questions: tuple[str, ...]) -> Dialogue:
    """The weather of one of the known cities."""
    city = rng.choice(phrases.CITIES)
    call = Turn("call", f'{{"city":"{city}"}}', "get_weather", learned=True)
    result, text = weather_result(rng, city)
    asked = rng.choice(questions).format(c=city)
    return tool_dialogue(rng, setting, asked, f"the weather in {city}", call, result, text)


def tool_dialogue(
    rng: Random, setting: Setting, asked: str, topic: str, call: Turn, result: str, text: str
) -> Dialogue:
    """The five messages of a tool call; one tool in sixteen fails."""
    if rng.random() < 0.06:
        result, text = tool_error(rng)
    thought = corpus.think_call(topic, call.tool, setting.effort)
    turns = (
        user(asked, rng),
        Turn("analysis", thought, learned=True),
        call,
        Turn("tool", result, call.tool),
        *reply(corpus.THINK_RESULT[setting.effort], text),
    )
    return Dialogue(call.tool, turns)


def use_tool_again(rng: Random, setting: Setting) -> Dialogue:
    """A second question that needs a tool, after another turn."""
    first = rng.choice([use_tool, use_tool, about_fact, small_talk])(rng, setting)
    if first.kind == "get_weather" and rng.random() < 0.6:
        second = use_weather(rng, setting, phrases.MORE_WEATHER)
    else:
        second = use_tool(rng, setting)
    return Dialogue(second.kind, (*forget(first), *second.turns))


PLAIN_MIX = ((about_fact, 54), (about_trivia, 8), (small_talk, 11), (stranger, 20),
             (two_turns, 10), (without_tool, 5))  # fmt: skip
TOOL_MIX = ((use_tool, 58), (use_tool_again, 8), (about_fact, 12), (small_talk, 6), (stranger, 12),
            (without_tool, 6), (about_trivia, 2))  # fmt: skip


def draw_dialogue(rng: Random, setting: Setting) -> Dialogue:
    """A dialogue that fits the setting."""
    mix = TOOL_MIX if setting.tools else PLAIN_MIX
    drawer = rng.choices([f for f, _ in mix], [weight for _, weight in mix])[0]
    if drawer is without_tool and set(setting.tools) == {"get_weather", "add"}:
        drawer = use_tool
    return drawer(rng, setting)
