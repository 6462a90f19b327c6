"""Tool names: identifiers for the model, and the way back."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony import (
    BROWSER,
    PYTHON,
    HarmonyParser,
    Toolbox,
    ToolCallDone,
    ToolDescription,
    function_tools,
    render_message,
    tool_call,
)
from mlx_gptoss.harmony.names import identifiers


def test_other_characters_and_clashes() -> None:
    assert identifiers(["get-weather", "get_weather", "get.weather", "Web Search", "2d", "ü"]) == {
        "get-weather": "get_weather_2",
        "get_weather": "get_weather",
        "get.weather": "get_weather_3",
        "Web Search": "Web_Search",
        "2d": "_2d",
        "ü": "_",
    }


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=12), unique=True))
def test_every_name_comes_back_from_a_rendered_call(names: list[str]) -> None:
    toolbox = Toolbox(ToolDescription(name=name) for name in names)
    assert sorted(toolbox.recipients.values()) == sorted(names)
    for name in names:
        recipient = toolbox.recipient(name)
        sampled = render_message(tool_call(recipient, "{}"))
        parser = HarmonyParser(toolbox.recipients)
        events = [event for token in sampled[2:] for event in parser.feed(token)]
        assert ToolCallDone(name, recipient, "{}") in events


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", ""], r"tools\[1\]\.name: expected a name of its own, got ''; give every tool"),
        (["a", "b", "a"], r"tools\[2\]\.name: expected a name of its own, got 'a' again"),
    ],
)
def test_empty_and_repeated_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(HarmonyError, match=message):
        identifiers(names)


def test_a_toolbox_of_both_kinds() -> None:
    weather = ToolDescription(name="get-weather", description="Weather")
    toolbox = Toolbox([weather], builtin=[BROWSER, PYTHON])
    assert toolbox.functions == (function_tools(replace(weather, name="get_weather")),)
    assert toolbox.builtin == (BROWSER, PYTHON)
    assert toolbox.recipients == {
        "functions.get_weather": "get-weather",
        "browser.search": "browser.search",
        "browser.open": "browser.open",
        "browser.find": "browser.find",
        "python": "python",
    }
    assert Toolbox().functions == ()


def test_a_name_of_a_built_in_tool_and_an_unknown_one_are_refused() -> None:
    python = ToolDescription(name="python")
    with pytest.raises(HarmonyError, match=r"than the built-in tools', got 'python'; rename"):
        Toolbox([python], builtin=[PYTHON])
    with pytest.raises(HarmonyError, match=r"tool 'x': expected one of \['python'\]; declare it"):
        Toolbox([python]).recipient("x")
