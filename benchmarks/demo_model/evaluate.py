"""Scores the shipped demo model on the fixed questions, with the runtime that users run.

    python -m benchmarks.demo_model.evaluate [--model FOLDER] [--seeds N] [--out SCORES.json]

Every turn is generated freely, token by token, and parsed like any other. Each question is asked at
temperature 0, and with N seeds at temperature 1. A tool question is right when the call has the
right name and arguments and the answer after the tool's result says what the result says.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from benchmarks.demo_model import questions
from benchmarks.demo_model.facts import DECLINE, LARGE_SUM, NO_WEATHER
from mlx_gptoss.demo import DEMO_SHA256, demo_model_path
from mlx_gptoss.engine import Engine
from mlx_gptoss.harmony import (
    DeveloperContent,
    Event,
    Message,
    MessageDone,
    ReasoningEffort,
    Repair,
    SystemContent,
    ToolDescription,
    assistant,
    developer,
    function_tools,
    render_conversation_for_completion,
    system,
    tool_result,
    user,
)
from mlx_gptoss.model import load_model
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import Reply, Turn, harmony_engine

MAX_TOKENS = 300
DATE = "2026-11-21"
EFFORTS = tuple(ReasoningEffort)
GET_WEATHER = ToolDescription(
    name="get_weather",
    description="Get the weather of a city.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
)
ADD = ToolDescription(
    name="add",
    description="Add two numbers.",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
    },
)


@dataclass(frozen=True)
class Case:
    """One question: the messages after the system message, and what is right."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[ToolDescription, ...] = ()
    says: tuple[str, ...] = ()  # any of these words, in the last answer
    call: tuple[str, dict[str, object]] | None = None
    result: str = ""


def cases() -> Iterator[Case]:
    """All cases, in a fixed order."""
    for kind, pairs in {**questions.TRAINED, **questions.NEW}.items():
        for question, says in pairs:
            yield Case(kind, (user(question),), says=(says,))
    for question in questions.DECLINED:
        yield Case("declined", (user(question),), says=(DECLINE, NO_WEATHER, LARGE_SUM))
    for first, answer, question, says in questions.FOLLOW_UPS:
        yield Case("second turn", (user(first), assistant(answer), user(question)), says=(says,))
    for instructions, question, says in questions.STYLED:
        content = DeveloperContent(instructions=instructions)
        yield Case("instructions", (developer(content), user(question)), says=(says,))
    yield from tool_cases()


def tool_cases() -> Iterator[Case]:
    """Calls with one tool and with both offered; questions that need none; a missing tool."""
    for number, (question, city) in enumerate(questions.WEATHER):
        tools = ((GET_WEATHER,), (GET_WEATHER, ADD), (ADD, GET_WEATHER))[number % 3]
        result, says = (
            f'{{"temperature":{number + 3},"sky":"windy"}}',
            f"windy and {number + 3} deg",
        )
        yield offered(
            "weather call", question, tools, (says,), ("get_weather", {"city": city}), result
        )
    for number, (question, a, b) in enumerate(questions.ADDITIONS):
        tools = ((ADD,), (GET_WEATHER, ADD), (ADD, GET_WEATHER))[number % 3]
        says = (f"{a} + {b} = {a + b}",)
        yield offered("add call", question, tools, says, ("add", {"a": a, "b": b}), str(a + b))
    for question, says in questions.TRAINED["capital"][:6] + questions.TRAINED["chat"][:4]:
        yield offered("tools not needed", question, (GET_WEATHER, ADD), (says,))
    for question, _ in questions.WEATHER[:5]:
        yield offered("tool missing", question, (ADD,), (NO_WEATHER,))
        yield Case("tool missing", (user(question),), says=(NO_WEATHER,))


def offered(
    kind: str,
    question: str,
    tools: tuple[ToolDescription, ...],
    says: tuple[str, ...],
    call: tuple[str, dict[str, object]] | None = None,
    result: str = "",
) -> Case:
    """A case with tools in the developer message."""
    content = DeveloperContent(tools=(function_tools(*tools),))
    return Case(kind, (developer(content), user(question)), tools, says, call, result)


@dataclass(frozen=True)
class Outcome:
    """What came of a case: its replies, the events of them, and whether it is right."""

    right: bool
    well_formed: bool
    reasoning_tokens: int
    replies: tuple[Reply, ...]


def run_turn(
    engine: Engine, case: Case, messages: list[Message], effort: ReasoningEffort, seed: int | None
) -> tuple[Reply, list[Event]]:
    """One turn at temperature 1 with the seed, or at temperature 0 without one."""
    start = system(SystemContent(date=DATE, effort=effort))
    sampling = SamplingParams(temperature=0 if seed is None else 1, seed=seed)
    turn = Turn(
        engine,
        render_conversation_for_completion([start, *messages]),
        sampling=sampling,
        max_tokens=MAX_TOKENS,
        recipients={f"functions.{tool.name}": tool.name for tool in case.tools},
    )
    events = list(turn.events())
    return turn.reply(), events


def run_case(engine: Engine, case: Case, effort: ReasoningEffort, seed: int | None) -> Outcome:
    """Ask, answer the call where there is one, and judge."""
    messages = list(case.messages)
    reply, events = run_turn(engine, case, messages, effort, seed)
    replies, right = [reply], True
    if case.call is not None:
        right = [(c.name, _arguments(c.arguments)) for c in reply.tool_calls] == [case.call]
        messages += [event.message for event in events if isinstance(event, MessageDone)]
        if reply.tool_calls:
            messages.append(tool_result(reply.tool_calls[0].recipient, case.result))
            reply, more = run_turn(engine, case, messages, effort, seed)
            replies.append(reply)
            events += more
    said = reply.text.lower()
    right = right and not reply.tool_calls and any(words.lower() in said for words in case.says)
    well_formed = not any(isinstance(event, Repair) for event in events)
    return Outcome(right, well_formed, replies[0].reasoning_tokens, tuple(replies))


def _arguments(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@dataclass
class Score:
    """Counts of one kind at one temperature."""

    asked: int = 0
    right: int = 0
    well_formed: int = 0


def evaluate(engine: Engine, seeds: int, *, show: int) -> dict[str, object]:
    """Asks everything; efforts take turns over the cases. Prints up to `show` wrong replies."""
    scores: dict[tuple[str, str], Score] = defaultdict(Score)
    reasoning: dict[str, list[int]] = defaultdict(list)
    for number, case in enumerate(cases()):
        effort = EFFORTS[number % 3]
        for seed in [None, *range(seeds)]:
            outcome = run_case(engine, case, effort, seed)
            score = scores[case.kind, "0" if seed is None else "1"]
            score.asked += 1
            score.right += outcome.right
            score.well_formed += outcome.well_formed
            if seed is None:
                reasoning[effort].append(outcome.reasoning_tokens)
            if not outcome.right and show:
                show -= 1
                said = [
                    (r.reasoning, r.text, *(c.arguments for c in r.tool_calls))
                    for r in outcome.replies
                ]
                print(f"  wrong, {effort}, seed {seed}: {case.messages[-1].content!r}: {said}")
    return summary(scores, reasoning)


def summary(
    scores: dict[tuple[str, str], Score], reasoning: dict[str, list[int]]
) -> dict[str, object]:
    """Counts by kind and temperature, and the mean length of the reasoning by effort."""
    kinds: dict[str, dict[str, str]] = defaultdict(dict)
    totals: dict[str, Score] = defaultdict(Score)
    for (kind, temperature), score in scores.items():
        kinds[kind][temperature] = f"{score.right}/{score.asked}"
        total = totals[temperature]
        total.asked += score.asked
        total.right += score.right
        total.well_formed += score.well_formed
    lengths = {effort: round(sum(n) / len(n), 1) for effort, n in reasoning.items()}
    return {
        "kinds": dict(kinds),
        "total": {t: f"{s.right}/{s.asked}" for t, s in totals.items()},
        "well_formed": {t: f"{s.well_formed}/{s.asked}" for t, s in totals.items()},
        "reasoning_tokens": lengths,
    }


def main() -> None:
    """Evaluate, print a table and one JSON line, and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="converted folder; default: the shipped model")
    parser.add_argument("--store", type=Path, default=Path(".demo-store"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--show", type=int, default=20, help="wrong replies printed")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.model or demo_model_path(arguments.store)
    began = time.time()
    engine = harmony_engine(load_model(folder))
    record = {
        "model_sha256": DEMO_SHA256,
        "seeds": arguments.seeds,
        **evaluate(engine, arguments.seeds, show=arguments.show),
        "machine": f"{platform.machine()} {platform.system()}",
        "mlx": mx.__version__,
        "wall_s": round(time.time() - began, 1),
    }
    print(f"{'kind':18}{'T = 0':>10}{'T = 1':>10}")
    for kind, right in record["kinds"].items():  # pyright: ignore
        print(f"{kind:18}{right['0']:>10}{right.get('1', '-'):>10}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
