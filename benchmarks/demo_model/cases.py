"""The fixed questions as conversations, each with what makes its answer right."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.demo_model import questions
from benchmarks.demo_model.facts import DECLINE, LARGE_SUM, NO_WEATHER
from mlx_gptoss.harmony import (
    DeveloperContent,
    Message,
    ToolDescription,
    assistant,
    developer,
    function_tools,
    user,
)

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
