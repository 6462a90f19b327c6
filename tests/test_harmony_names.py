"""Tool names: identifiers for the model, and the way back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.errors import HarmonyError
from mlx_gptoss.harmony import BROWSER, PYTHON, HarmonyParser, ToolCallDone, ToolDescription
from mlx_gptoss.harmony.messages import function_tools, tool_call
from mlx_gptoss.harmony.names import identifiers, recipients
from mlx_gptoss.harmony.render import render_message


def test_other_characters_and_clashes() -> None:
    assert identifiers(["get-weather", "get_weather", "get.weather", "Web Search", "2d", "ü"]) == {
        "get-weather": "get_weather_2",
        "get_weather": "get_weather",
        "get.weather": "get_weather_3",
        "Web Search": "Web_Search",
        "2d": "_2d",
        "ü": "_",
    }


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), unique=True))
def test_every_name_comes_back_from_a_rendered_call(names: list[str]) -> None:
    chosen = identifiers(names)
    assert len(set(chosen.values())) == len(names)
    tools = function_tools(*(ToolDescription(name=name) for name in chosen.values()))
    back = recipients([tools], chosen)
    for name, identifier in chosen.items():
        sampled = render_message(tool_call(f"functions.{identifier}", "{}"))
        parser = HarmonyParser(back)
        events = [event for token in sampled[2:] for event in parser.feed(token)]
        assert ToolCallDone(name, f"functions.{identifier}", "{}") in events


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


def test_recipients_of_built_in_tools() -> None:
    assert recipients([BROWSER, PYTHON]) == {
        name: name for name in ("browser.search", "browser.open", "browser.find", "python")
    }
