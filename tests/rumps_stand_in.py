"""The part of rumps 0.4.0 that the menu-bar example uses, without macOS.

Names, parameters and defaults are those of rumps' sources (BSD licence, Jared Suttles): what this
refuses, rumps refuses. What a person does is told through `Window.answers` and `MenuItem.click`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

Callback = Callable[[Any], object]


def _require_string_or_none(*values: object) -> None:
    if not all(value is None or isinstance(value, str) for value in values):
        raise TypeError(f"a string or None is required, got {values!r}")


class MenuItem:
    def __init__(
        self,
        title: object,
        callback: Callback | None = None,
        key: str | None = None,
        icon: str | None = None,
        dimensions: object = None,
        template: bool | None = None,
    ):
        self.title = str(title)
        self.key = ""
        self.set_callback(callback, key)

    def set_callback(self, callback: Callback | None, key: str | None = None) -> None:
        _require_string_or_none(key)
        self.key, self.callback = self.key if key is None else key, callback

    def click(self) -> None:
        """What a person can only do while the item is not grey."""
        assert self.callback is not None, f"{self.title!r} is grey"
        self.callback(self)


class App:
    """`run` returns at once, as if Quit were chosen."""

    def __init__(
        self,
        name: str,
        title: str | None = None,
        icon: str | None = None,
        template: bool | None = None,
        menu: Iterable[object] | None = None,
        quit_button: str | None = "Quit",
    ):
        if not isinstance(name, str):
            raise TypeError("a string is required")
        self.title = title
        items = [
            item if isinstance(item, MenuItem | None) else MenuItem(item) for item in menu or ()
        ]
        self.menu = {item.title: item for item in items if item}
        if quit_button is not None:
            self.menu[quit_button] = MenuItem(quit_button, callback=quit_application)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "title":
            _require_string_or_none(value)
        super().__setattr__(name, value)

    def run(self, **options: object) -> None:
        assert set(options) <= {"debug"}
        quit_application()


@dataclass(frozen=True)
class Response:
    clicked: int
    text: str


class Window:
    answers: ClassVar[list[Response]] = []
    shown: ClassVar[list["Window"]] = []

    def __init__(
        self,
        message: object = "",
        title: object = "",
        default_text: object = "",
        ok: str | None = None,
        cancel: str | bool | None = None,
        dimensions: tuple[int, int] = (320, 160),
        secure: bool = False,
    ):
        _require_string_or_none(ok)
        width, height = dimensions
        assert width > 0 and height > 0
        self.message, self.title = str(message), str(title)
        self.default_text = str(default_text)

    def run(self) -> Response:
        self.shown.append(self)
        return self.answers.pop(0) if self.answers else Response(1, self.default_text)


timers: list["Timer"] = []


class Timer:
    def __init__(self, callback: Callback, interval: float):
        self.callback, self.interval, self._alive = callback, interval, False
        timers.append(self)

    def start(self) -> None:
        self._alive = True

    def is_alive(self) -> bool:
        return self._alive

    def fire(self) -> None:
        """What the run loop does, once an interval has passed."""
        assert self._alive
        self.callback(self)


class _Event:
    def __init__(self) -> None:
        self.callbacks: set[Callable[[], object]] = set()

    def register(self, function: Callable[[], object]) -> Callable[[], object]:
        self.callbacks.add(function)
        return function

    def emit(self) -> None:
        for callback in self.callbacks:
            callback()


events = SimpleNamespace(before_quit=_Event())
notified: list[tuple[str | None, str | None, str | None]] = []
bundled = True  # an app without an Info.plist has no notifications


def notification(
    title: str | None,
    subtitle: str | None,
    message: str | None,
    data: object = None,
    sound: bool = True,
    action_button: str | None = None,
    other_button: str | None = None,
    has_reply_button: bool = False,
    icon: str | None = None,
    ignoreDnD: bool = False,
) -> None:
    _require_string_or_none(title, subtitle, message)
    if not bundled:
        raise RuntimeError("Failed to setup the notification center.")
    notified.append((title, subtitle, message))


def quit_application(sender: object = None) -> None:
    events.before_quit.emit()
