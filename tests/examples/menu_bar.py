"""A menu-bar app for macOS: ask from the menu, go on working, read the answer in a window.

    pip install rumps
    python tests/examples/menu_bar.py -m 20b

Never run on a Mac. It is written against the sources of rumps 0.4.0, and `tests/test_examples.py`
drives it with a stand-in that has the same names and takes the same arguments.

rumps calls everything here in the main thread, as AppKit demands; `BackgroundChat` has another. A
timer of rumps stands still while a menu or a window is open: what happened meanwhile waits.
"""

import argparse
from contextlib import suppress

import rumps  # pyright: ignore[reportMissingImports]
from background_chat import BackgroundChat, Happening, Opened, Stopped, summary

from mlx_gptoss import Reply
from mlx_gptoss.harmony import ReasoningEffort, TextDelta

NAME = "gpt-oss"
POLL_S = 0.1


class MenuBar:
    """The app's menu; items without a callback are grey.

    Args:
        chat: Answers.

    Attributes:
        app: To be run.
    """

    def __init__(self, chat: BackgroundChat):
        self._chat, self._question, self._answer = chat, "", ""
        self._status = rumps.MenuItem("Opening the model ...")
        self._ask_item = rumps.MenuItem("Ask ...")
        self._read_item = rumps.MenuItem("Read the answer")
        self._stop_item = rumps.MenuItem("Stop")
        self._new_item = rumps.MenuItem("New chat")
        items = [self._ask_item, self._read_item, self._stop_item, self._new_item]
        self.app = rumps.App(NAME, menu=[self._status, None, *items, None])  # and its own Quit
        rumps.events.before_quit.register(chat.close)  # also at log-out
        self._timer = rumps.Timer(self._poll, POLL_S)
        self._timer.start()

    def _expect_question(self, status: str) -> None:
        self._status.title = status
        self._ask_item.set_callback(self._ask, key="a")
        self._new_item.set_callback(self._new_chat)
        self._stop_item.set_callback(None)

    def _ask(self, _: object) -> None:
        asked = rumps.Window(title=NAME, ok="Ask", cancel=True, dimensions=(320, 60)).run()
        question = asked.text.strip()
        if asked.clicked != 1 or not question:
            return
        self._question, self._answer = question, ""
        self._chat.ask(question, reasoning=ReasoningEffort.LOW)
        self.app.title, self._status.title = f"{NAME} ...", "Thinking ..."
        self._ask_item.set_callback(None)
        self._read_item.set_callback(self._read)
        self._stop_item.set_callback(lambda _: self._chat.stop())

    def _read(self, _: object) -> None:
        """Show what was answered so far; a window's text can be selected and copied."""
        rumps.Window(
            message=self._question,
            title=self._status.title,
            default_text=self._answer,
            ok="Close",
            dimensions=(420, 240),
        ).run()

    def _new_chat(self, _: object) -> None:
        self._chat.reset()
        self._question = self._answer = ""
        self._read_item.set_callback(None)
        self.app.title = NAME
        self._expect_question("A new chat")

    def _poll(self, _: object) -> None:
        for happening in self._chat.take():
            self._show(happening)

    def _show(self, happening: Happening) -> None:
        match happening:
            case Opened():
                self._expect_question("Ready")
            case TextDelta(text):
                self._answer += text
            case Reply():
                self._finish(summary(happening))
            case Stopped():
                self._finish("Stopped")
            case Exception():
                self._answer += str(happening)
                self._read_item.set_callback(self._read)
                self._finish("Failed")

    def _finish(self, status: str) -> None:
        self.app.title = NAME
        if self._question:  # else the model could not be opened: nothing can be asked
            self._expect_question(status)
        else:
            self._status.title = status
        with suppress(RuntimeError):  # rumps: no notifications without an Info.plist
            rumps.notification(NAME, status, self._answer)


def main() -> None:
    """Show the menu until Quit is chosen."""
    parser = argparse.ArgumentParser(description="Ask gpt-oss from the menu bar.")
    parser.add_argument("-m", "--model", default="demo", help="as in Runtime.open [%(default)s]")
    bar = MenuBar(BackgroundChat(parser.parse_args().model))
    bar.app.run()


if __name__ == "__main__":
    main()
