"""A chat window in Tk: answers appear as they are written, and the window never waits for them.

    python tests/examples/chat_window.py -m 20b

`BackgroundChat` owns the model; this file is the window alone. Tk belongs to the main thread, so
the window asks every 30 ms what happened, instead of being called by another thread.
"""

import argparse
import signal
import sys
import tkinter as tk
from collections.abc import Callable
from tkinter import ttk

from background_chat import BackgroundChat, Happening, Opened, Stopped, summary

from mlx_gptoss import Reply, SamplingParams
from mlx_gptoss.harmony import ReasoningDelta, ReasoningEffort, TextDelta

POLL_MS = 30
INK, DIM, PAPER, BUBBLE, FAULT = "#1d1d1f", "#85858b", "#ffffff", "#e8f0fe", "#c5221f"
OPEN, FOLDED = "\u25be", "\u25b8"  # triangles


class ChatWindow:
    """The window of one chat.

    Args:
        root: The application's window; closing it closes the chat.
        chat: Answers.
        first: Asked as soon as the model is there, if anything.
        on_reply: Called with each reply.
    """

    def __init__(
        self,
        root: tk.Tk,
        chat: BackgroundChat,
        *,
        first: str = "",
        on_reply: Callable[[Reply], None] = lambda reply: None,
    ):
        self._root, self._chat, self._first, self._on_reply = root, chat, first, on_reply
        self._question, self._effort = tk.StringVar(), tk.StringVar(value=ReasoningEffort.MEDIUM)
        self._status = tk.StringVar()
        self._opened, self._turn = False, 0
        self._tags: tuple[str, ...] = ()  # of what was written last
        root.title("gpt-oss")
        root.geometry("640x480")
        self._build_bar()
        self._build_foot()
        self._build_transcript()
        self._status.set("Opening the model ...")
        root.protocol("WM_DELETE_WINDOW", self.close)
        root.createcommand("tk::mac::Quit", self.close)  # Cmd-Q would end the process at once
        self._poll()

    def close(self) -> None:
        """Stop the turn, free the model, end the application."""
        self._root.withdraw()
        self._chat.close()
        self._root.destroy()

    def _build_bar(self) -> None:
        bar = ttk.Frame(self._root, padding=(12, 8))
        bar.pack(fill="x")
        ttk.Label(bar, text="Reasoning").pack(side="left", padx=(0, 6))
        for effort in ReasoningEffort:
            choice = ttk.Radiobutton(bar, text=effort, value=effort, variable=self._effort)
            choice.pack(side="left", padx=2)
        ttk.Button(bar, text="New chat", command=self._new_chat).pack(side="right")

    def _build_foot(self) -> None:
        foot = ttk.Frame(self._root, padding=(12, 8))
        foot.pack(side="bottom", fill="x")
        ttk.Label(foot, textvariable=self._status, foreground=DIM).pack(side="bottom", anchor="w")
        self._button = ttk.Button(foot, text="Send", state="disabled")
        self._button.pack(side="right", padx=(8, 0), pady=(0, 6))
        self._entry = ttk.Entry(foot, textvariable=self._question)
        self._entry.pack(side="left", fill="x", expand=True, pady=(0, 6))
        self._entry.bind("<Return>", lambda _: self._ask())
        self._entry.focus()
        self._root.bind("<Escape>", lambda _: self._chat.stop())

    def _build_transcript(self) -> None:
        look = {"background": PAPER, "foreground": INK, "font": "TkTextFont", "spacing2": 2}
        text = tk.Text(self._root, wrap="word", state="disabled", padx=16, pady=8, bd=0, **look)
        scroll = ttk.Scrollbar(self._root, command=text.yview)
        scroll.pack(side="right", fill="y")
        text.pack(fill="both", expand=True)
        text["yscrollcommand"] = scroll.set
        text.bind("<Button-1>", lambda _: text.focus())  # so that what is selected can be copied
        text.tag_configure("question", background=BUBBLE, spacing1=8, spacing3=8)
        text.tag_configure("fold", foreground=DIM, spacing1=8)
        text.tag_configure("reasoning", foreground=DIM, lmargin1=16, lmargin2=16)
        text.tag_configure("answer", spacing1=8)
        text.tag_configure("fault", foreground=FAULT, spacing1=8)
        self._text = text

    def _expect_question(self, status: str) -> None:
        self._opened = True
        self._status.set(status)
        self._button.configure(text="Send", command=self._ask)
        self._button.state(["!disabled"])

    def _expect_answer(self) -> None:
        self._status.set("Thinking ...")
        self._button.configure(text="Stop", command=self._chat.stop)

    def _ask(self) -> None:
        question = self._question.get().strip()
        if question and self._opened and self._button["text"] == "Send":
            self._question.set("")
            self._turn += 1
            self._write(question, "question", f"question-{self._turn}")
            self._chat.ask(question, reasoning=ReasoningEffort(self._effort.get()))
            self._expect_answer()

    def _new_chat(self) -> None:
        if self._opened:
            self._chat.reset()
            self._edit("delete", "1.0", "end")
            self._tags = ()
            self._expect_question("A new chat")

    def _poll(self) -> None:
        for happening in self._chat.take():
            self._show(happening)
        self._root.after(POLL_MS, self._poll)

    def _show(self, happening: Happening) -> None:
        match happening:
            case Opened():
                self._expect_question("Ready")
                self._question.set(self._first)
                self._ask()
            case ReasoningDelta(text):
                if self._tags[0] == "question":
                    fold, thought = f"fold-{self._turn}", f"thought-{self._turn}"
                    self._write(f"{OPEN} Reasoning", "fold", fold)
                    self._bind_fold(fold, thought)
                self._write(text, "reasoning", f"thought-{self._turn}")
            case TextDelta(text):
                self._write(text, "answer")
            case Reply():
                self._expect_question(summary(happening))
                self._on_reply(happening)
            case Stopped():
                self._expect_question("Stopped")
            case Exception():
                self._write(str(happening), "fault")
                if self._opened:
                    self._expect_question("Failed; ask again")
                else:
                    self._status.set("The model could not be opened")

    def _write(self, text: str, *tags: str) -> None:
        """Add to the transcript; what has other tags than the last begins a new line."""
        at_end = self._text.yview()[1] == 1.0
        if self._tags and tags != self._tags:
            self._edit("insert", "end", "\n", self._tags)
        self._tags = tags
        self._edit("insert", "end", text, tags)
        if at_end:  # else somebody is reading further up
            self._text.see("end")

    def _bind_fold(self, fold: str, thought: str) -> None:
        """Let a click on a turn's fold hide its reasoning, or show it again."""

        def toggle(_: object) -> None:
            hide = self._text.tag_cget(thought, "elide") != "1"
            self._text.tag_configure(thought, elide=hide)
            arrow = self._text.tag_ranges(fold)[0]
            self._edit("replace", arrow, f"{arrow}+1c", FOLDED if hide else OPEN, ("fold", fold))

        self._text.tag_bind(fold, "<Button-1>", toggle)

    def _edit(self, method: str, *arguments: object) -> None:
        self._text["state"] = "normal"
        getattr(self._text, method)(*arguments)
        self._text["state"] = "disabled"


def main() -> None:
    """Open the window; Ctrl-C in the terminal closes it."""
    parser = argparse.ArgumentParser(description="Chat with gpt-oss in a window.")
    parser.add_argument("-m", "--model", default="demo", help="as in Runtime.open [%(default)s]")
    parser.add_argument("--temperature", type=float, default=1.0, help="[%(default)s]")
    parser.add_argument("--ask", default="", help="ask this at the start, and print answers")
    given = parser.parse_args()

    def on_reply(reply: Reply) -> None:
        if given.ask:
            sys.stdout.write(f"{reply.text}\n")
            sys.stdout.flush()

    root = tk.Tk()
    if root.tk.call("tk", "windowingsystem") == "x11":
        ttk.Style(root).theme_use("clam")  # the default there is that of 1995
    chat = BackgroundChat(given.model, sampling=SamplingParams(temperature=given.temperature))
    window = ChatWindow(root, chat, first=given.ask, on_reply=on_reply)
    signal.signal(signal.SIGINT, lambda *_: root.after_idle(window.close))
    root.mainloop()


if __name__ == "__main__":
    main()
