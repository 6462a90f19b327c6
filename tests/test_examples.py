"""The examples that apps copy: the chat behind them, the Tk window, the menu bar."""

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scripted
from running import open_model
from xvfb import Screen, screen_or_skip

from mlx_gptoss import Runtime
from mlx_gptoss.conversation import read_conversation
from mlx_gptoss.errors import ContextLengthError, ModelNotFoundError
from mlx_gptoss.harmony import ReasoningEffort, TextDelta, assistant, user
from mlx_gptoss.harmony.ledger import prepare_prompt
from mlx_gptoss.turn import Reply
from mlx_gptoss.vocabulary import load_vocabulary

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "tests" / "examples"
LOW, HIGH = ReasoningEffort.LOW, ReasoningEffort.HIGH
MORE = scripted.SCRIPTS["slow"].count("more")  # words that the slow model would write


@pytest.fixture(autouse=True)
def example_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> scripted.ScriptedModel:
    """What every model name opens in this test."""
    model = scripted.ScriptedModel(scripted.ANSWERED)
    monkeypatch.setattr(Runtime, "open", lambda name: open_model(model))
    return model


@pytest.fixture
def chat(model: scripted.ScriptedModel) -> Iterator[Any]:
    chat = importlib.import_module("background_chat").BackgroundChat("any")
    yield chat
    chat.close()
    assert not left_over()


def left_over() -> list[str]:
    """Threads of a chat that is still open."""
    return [t.name for t in threading.enumerate() if t.name in ("chat", "mlx-gptoss")]


def until(done: Callable[[], object], *, between: Callable[[], object] = lambda: None) -> None:
    """Wait for something that must come; the time is for a busy machine only."""
    deadline = time.monotonic() + 60
    while not done():
        between()
        time.sleep(0.005)
        assert time.monotonic() < deadline, "it never came"


def happened(chat: Any, last: str) -> list[Any]:
    """What happens up to the first thing of a type."""
    taken: list[Any] = []
    until(lambda: taken.extend(chat.take()) or any(type(h).__name__ == last for h in taken))
    return taken


def texts(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, TextDelta)]


def slow(model: scripted.ScriptedModel, *, step_s: float = 0.02) -> None:
    model.script, model._step_s = scripted.SCRIPTS["slow"], step_s


def prompt_of(model: scripted.ScriptedModel) -> str:
    return load_vocabulary().decode(model.prompt)


def test_a_turn_arrives_in_pieces_and_the_next_one_reuses_it(chat: Any, model: Any) -> None:
    assert len(happened(chat, "Opened")) == 1
    chat.ask("Two and two?", reasoning=HIGH)
    events = happened(chat, "Reply")
    assert "".join(texts(events)) == "Four, naïvely: 4."
    assert len(texts(events)) > 3 and isinstance(events[-1], Reply)
    assert "Reasoning: high" in prompt_of(model)
    chat.ask("And five?", reasoning=HIGH)
    usage = happened(chat, "Reply")[-1].usage
    assert 0 < usage.prompt_tokens - usage.cached_tokens < usage.cached_tokens
    assert "Four, naïvely: 4." in prompt_of(model)


def test_stop_ends_the_turn_within_a_token_and_keeps_what_was_said(chat: Any, model: Any) -> None:
    slow(model, step_s=0.1)
    chat.ask("Count.", reasoning=LOW)
    before = happened(chat, "TextDelta")
    chat.stop()
    after = happened(chat, "Stopped")
    assert len(texts(after)) <= 5, "one, and some for a machine that is busy"
    said = "".join(texts([*before, *after]))
    assert said.startswith("One")
    model.script = scripted.ANSWERED
    chat.ask("Go on.", reasoning=LOW)
    usage = happened(chat, "Reply")[-1].usage
    told = [user("Count."), assistant(said), user("Go on.")]
    conversation = read_conversation(told, date=date.today().isoformat(), reasoning=LOW)
    assert usage.prompt_tokens == len(prepare_prompt(conversation.messages).tokens)


def test_a_turn_stopped_at_once_is_forgotten(chat: Any, model: Any) -> None:
    slow(model)
    chat.ask("Never mind.", reasoning=LOW)
    chat.stop()
    assert happened(chat, "Stopped")
    model.script = scripted.ANSWERED
    chat.ask("Two and two?", reasoning=LOW)
    happened(chat, "Reply")
    assert "Never mind." not in prompt_of(model)


def test_a_new_chat_knows_nothing_of_the_old_one(chat: Any, model: Any) -> None:
    slow(model)
    chat.ask("Count.", reasoning=LOW)
    happened(chat, "TextDelta")
    chat.reset()
    model.script = scripted.ANSWERED
    chat.ask("Two and two?", reasoning=LOW)
    events = happened(chat, "Reply")
    assert "".join(texts(events)) == "Four, naïvely: 4."
    assert "Stopped" not in [type(event).__name__ for event in events]  # that was the old one's
    assert "Count." not in prompt_of(model)


def test_an_error_is_an_event_and_the_chat_goes_on(chat: Any, model: Any) -> None:
    model.config.max_position_embeddings = 10
    chat.ask("Two and two?", reasoning=LOW)
    assert isinstance(happened(chat, "ContextLengthError")[-1], ContextLengthError)
    model.config.max_position_embeddings = 1000
    chat.ask("Once more?", reasoning=LOW)
    assert happened(chat, "Reply")[-1].text and "Two and two?" not in prompt_of(model)


def test_closing_ends_a_running_turn_and_may_be_repeated(chat: Any, model: Any) -> None:
    slow(model)
    chat.ask("Count.", reasoning=LOW)
    happened(chat, "TextDelta")
    chat.close()
    chat.close()
    assert not left_over()


def test_a_model_that_is_not_there_is_an_event() -> None:
    chat = importlib.import_module("background_chat").BackgroundChat("no such model")
    [error] = happened(chat, "ModelNotFoundError")
    assert isinstance(error, ModelNotFoundError)
    assert str(error).startswith("no such model: expected demo, 20b, 120b, a folder or a hub id")
    chat.close()


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Screen]:
    with screen_or_skip(tmp_path_factory.mktemp("screen")) as screen:
        yield screen


class Window:
    """A chat window, seen and used as a person does."""

    def __init__(self, screen: Screen, chat: Any, **options: Any):
        import tkinter

        self.root = tkinter.Tk(screenName=screen.display)
        self.window = importlib.import_module("chat_window").ChatWindow(self.root, chat, **options)
        self.entry, self.text = self._only("TEntry"), self._only("Text")
        self.root.update()

    def _all(self, kind: str) -> list[Any]:
        def below(widget: Any) -> Iterator[Any]:
            yield widget
            for child in widget.winfo_children():
                yield from below(child)

        return [widget for widget in below(self.root) if widget.winfo_class() == kind]

    def _only(self, kind: str) -> Any:
        [widget] = self._all(kind)
        return widget

    def button(self, label: str) -> Any:
        buttons = self._all("TButton") + self._all("TRadiobutton")
        [button] = [button for button in buttons if button["text"] == label]
        return button

    @property
    def status(self) -> str:
        return str(self._all("TLabel")[-1]["text"])

    @property
    def shown(self) -> str:
        """The transcript without what is folded away."""
        return str(self.root.tk.call(str(self.text), "get", "-displaychars", "1.0", "end"))

    def until(self, done: Callable[[], object]) -> None:
        until(done, between=self.root.update)

    def ask(self, question: str) -> None:
        self.entry.focus_force()
        self.root.update()
        self.entry.insert(0, question)
        self.entry.event_generate("<Return>")
        self.root.update()

    def click(self, tag: str) -> None:
        """Click on the beginning of tagged text."""
        x, y, width, height = self.text.bbox(f"{tag}.first")
        for event in ("<Motion>", "<Button-1>", "<ButtonRelease-1>"):
            self.text.event_generate(event, x=x + width // 2, y=y + height // 2)
        self.root.update()


@pytest.fixture
def window(screen: Screen, chat: Any) -> Iterator[Window]:
    window = Window(screen, chat)
    window.until(lambda: window.status == "Ready")
    yield window
    window.window.close()


def test_the_window_shows_reasoning_dimmed_and_folds_it(window: Window, model: Any) -> None:
    window.button("high").invoke()
    window.ask("Two and two?")
    assert window.entry.get() == "" and window.status == "Thinking ..."
    window.until(lambda: "reused" in window.status)
    whole = "Two and two?\n\u25be Reasoning\nTwo and two.\nFour, naïvely: 4.\n"
    assert window.shown == whole and "Reasoning: high" in prompt_of(model)
    colour = {tag: str(window.text.tag_cget(tag, "foreground")) for tag in ("reasoning", "fold")}
    assert set(colour.values()) == {"#85858b"} != {str(window.text["foreground"])}
    window.click("fold-1")
    assert window.shown == "Two and two?\n\u25b8 Reasoning\nFour, naïvely: 4.\n"
    window.click("fold-1")
    assert window.shown == whole
    window.ask("And five?")
    window.until(lambda: "And five?" in window.shown and "reused" in window.status)
    reused, of = (int(window.status.split(", ")[2].split()[place]) for place in (0, 2))
    assert 0 < of - reused < reused and "tokens/s" in window.status


def test_the_window_lives_while_an_answer_is_written(window: Window, model: Any) -> None:
    """What is typed appears, and what was written so far is shown, before the answer is over."""
    slow(model)
    window.ask("Count.")
    window.until(lambda: "One, two" in window.shown)
    window.entry.insert(0, "next")
    window.entry.event_generate("<Return>")
    window.until(lambda: "five, more" in window.shown)  # Return neither asked nor stopped
    assert window.entry.get() == "next" and window.status == "Thinking ..."
    window.button("Stop").invoke()
    window.until(lambda: window.status == "Stopped")
    assert window.shown.count("more") < MORE
    window.button("New chat").invoke()
    assert window.shown == "\n" and window.status == "A new chat"


def test_a_new_chat_in_the_middle_of_an_answer(window: Window, model: Any) -> None:
    slow(model)
    window.ask("Count.")
    window.until(lambda: "One" in window.shown)
    window.button("New chat").invoke()
    model.script = scripted.ANSWERED
    window.ask("Two and two?")
    window.until(lambda: "reused" in window.status)
    assert window.shown.startswith("Two and two?\n") and "One" not in window.shown


def test_the_window_shows_errors_and_goes_on(window: Window, model: Any) -> None:
    model.config.max_position_embeddings = 10
    window.ask("Two and two?")
    window.until(lambda: window.status == "Failed; ask again")
    assert "context" in window.shown and window.text.tag_ranges("fault")
    model.config.max_position_embeddings = 1000
    window.ask("Two and two?")
    window.until(lambda: "Four, naïvely: 4." in window.shown)


def test_the_window_says_why_a_model_does_not_open(screen: Screen) -> None:
    chat = importlib.import_module("background_chat").BackgroundChat("no such model")
    window = Window(screen, chat, first="Anyone?")
    window.until(lambda: window.status == "The model could not be opened")
    assert window.shown.startswith("no such model: expected demo, 20b")
    window.ask("Hello?")
    assert "Hello?" not in window.shown and window.button("Send").instate(["disabled"])
    window.window.close()


def test_closing_the_window_ends_everything(window: Window, model: Any) -> None:
    slow(model)
    window.ask("Count.")
    window.until(lambda: "One" in window.shown)
    window.window.close()
    window.window.close = lambda: None  # the fixture's
    assert not left_over()


@pytest.fixture
def rumps(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name in ("rumps_stand_in", "menu_bar"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    stand_in = importlib.import_module("rumps_stand_in")
    monkeypatch.setitem(sys.modules, "rumps", stand_in)
    yield stand_in


class Bar:
    """The menu-bar app, used as a person does."""

    def __init__(self, rumps: Any, chat: Any):
        self.bar = importlib.import_module("menu_bar").MenuBar(chat)
        self.item, self._rumps = self.bar.app.menu, rumps
        self._status = next(iter(self.item.values()))

    def until(self, status: str) -> None:
        until(lambda: status in self._status.title, between=self._rumps.timers[-1].fire)

    def ask(self, *answers: tuple[int, str]) -> None:
        self._rumps.Window.answers += [self._rumps.Response(*answer) for answer in answers]
        for _ in answers:
            self.item["Ask ..."].click()

    def read(self) -> tuple[str, str]:
        self.item["Read the answer"].click()
        window = self._rumps.Window.shown[-1]
        return window.message, window.default_text


def test_the_menu_bar_asks_and_tells(rumps: Any, chat: Any, model: Any) -> None:
    bar = Bar(rumps, chat)
    assert bar.item["Ask ..."].callback is None is bar.item["Read the answer"].callback
    bar.until("Ready")
    bar.ask((0, "cancelled"), (1, "  "))
    assert bar.item["Ask ..."].callback and not model.prompt
    bar.ask((1, "Two and two?"))
    assert bar.item["Ask ..."].callback is None and bar.bar.app.title == "gpt-oss ..."
    bar.until("reused")
    assert bar.read() == ("Two and two?", "Four, naïvely: 4.") and bar.bar.app.title == "gpt-oss"
    [(title, status, answer)] = rumps.notified
    assert (title, answer) == ("gpt-oss", "Four, naïvely: 4.") and "tokens" in status
    assert [item for item in bar.item][1:] == [
        "Ask ...", "Read the answer", "Stop", "New chat", "Quit"
    ]  # fmt: skip


def test_the_menu_bar_stops_and_begins_anew(rumps: Any, chat: Any, model: Any) -> None:
    rumps.bundled = False  # no notifications
    slow(model)
    bar = Bar(rumps, chat)
    bar.until("Ready")
    bar.ask((1, "Count."))
    until(lambda: bar.read()[1].startswith("One"), between=rumps.timers[-1].fire)
    bar.item["Stop"].click()
    bar.until("Stopped")
    assert bar.item["Stop"].callback is None and bar.read()[1].count("more") < MORE
    bar.item["New chat"].click()
    bar.until("A new chat")
    assert bar.item["Read the answer"].callback is None
    bar.item["Quit"].click()
    assert not left_over()


def test_the_menu_bar_says_what_failed(rumps: Any, chat: Any, model: Any) -> None:
    model.config.max_position_embeddings = 10
    bar = Bar(rumps, chat)
    bar.until("Ready")
    bar.ask((1, "Two and two?"))
    bar.until("Failed")
    assert "context" in bar.read()[1] and bar.item["Ask ..."].callback


def test_the_menu_bar_of_a_model_that_is_not_there(
    rumps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["menu_bar", "-m", "no such model"])
    menu_bar = importlib.import_module("menu_bar")
    menu_bar.main()  # the stand-in quits at once
    assert not left_over()
    rumps.timers[-1].fire()
    [(_, status, text)] = rumps.notified
    assert status == "Failed" and text.startswith("no such model: expected demo, 20b")
