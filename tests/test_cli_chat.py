"""The chat: commands, several lines, stopping, saving, a pipe and a real terminal."""

import contextlib
import json
import os
import pty
import re
import readline
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scripted
from click.testing import CliRunner, Result

from mlx_gptoss import library, memory, model
from mlx_gptoss.cli import chat_session, main
from mlx_gptoss.cli.chat import COMMANDS
from mlx_gptoss.cli.chat_completion import completions
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.vocabulary import load_vocabulary

ROOT = Path(__file__).resolve().parent.parent
ANSWER = "Four, naïvely: 4.\n"


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> scripted.ScriptedModel:
    for module, name in ((library, "find_model"), (model, "load_model"), (memory, "memory_of")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that all are put back
    return scripted.install(scripted.ANSWERED)


def chat(text: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["chat", "-m", "x", "--temperature", "0", *arguments],
                              input=text)  # fmt: skip


def test_lines_of_a_pipe_are_messages_that_know_those_before(
    answering: scripted.ScriptedModel,
) -> None:
    result = chat("One?\n\nTwo,\\\nthree?\n", "--system", "Be kind.", "--reasoning", "low")
    assert (result.exit_code, result.stdout) == (0, 2 * ANSWER)
    told = load_vocabulary().decode(answering.prompt)
    assert "Reasoning: low" in told and "# Instructions\n\nBe kind.<|end|>" in told
    assert told.endswith(
        "<|start|>user<|message|>One?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Four, naïvely: 4.<|end|>"
        "<|start|>user<|message|>Two,\nthree?<|end|><|start|>assistant"
    )
    first, second = result.stderr.splitlines()
    assert "cached" not in first and re.match(r"prompt \d+ tok \(\d+ cached\)", second)


def test_options_of_sampling_are_those_of_generate(
    answering: scripted.ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(chat_session.Session):
        def __init__(self, runtime: Runtime, **given: Any) -> None:
            seen.append(given["sampling"])
            super().__init__(runtime, **given)

    monkeypatch.setattr(chat_session, "Session", Watched)
    result = chat("One?\n", "--top-p", "0.5", "--top-k", "3", "--min-p", "0.1", "--seed", "7")
    assert (result.exit_code, result.stdout) == (0, ANSWER)
    assert seen == [SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=7)]


def test_commands(answering: scripted.ScriptedModel, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    result = chat(
        '/help\n/reasoning\n/reasoning high\n/system Sing.\n/tools\nOne?\n"""a\n b\n"""\n'
        f"/stats\n/save {saved}\n/reset\n/stats\n/load {saved}\nThree?\n/quit\nnever\n",
        "--quiet",
    )
    assert (result.exit_code, result.stdout) == (0, 3 * ANSWER)
    lines = result.stderr.splitlines()
    assert lines[0].startswith("/help ") and "Ctrl-C stops an answer and keeps the chat." in lines
    told = result.stderr.partition("keeps the chat.\n")[2].splitlines()
    assert told[:4] == [
        "Reasoning: medium.", "Reasoning: high.", "System: Sing.", "Tools: none."
    ]  # fmt: skip
    assert re.fullmatch(
        r"2 replies \| prompt \d+ tok, \d+ of them reused \| output 46 tok \(16 reasoning\)",
        told[4],
    )
    assert told[5] == f"6 messages saved to {saved}." and told[6] == "A new chat."
    assert told[8] == f"6 messages loaded from {saved}."
    prompt = load_vocabulary().decode(answering.prompt)
    assert "Reasoning: high" in prompt and "Sing." in prompt
    assert prompt.count("<|start|>user") == 3 and "<|message|>a\n b<|end|>" in prompt
    assert json.loads(saved.read_text())["messages"][2]["sampled"][0] == 200_006


def test_mistakes_are_told_and_the_chat_goes_on(
    answering: scripted.ScriptedModel, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("[1]")
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "empty.py").write_text("_x = 1")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    (tmp_path / "notes").write_text("keep me")
    commands = [
        ("/no", "/no: no such command; type /help"),
        ("/reasoning huge", "/reasoning: expected low, medium or high, got 'huge'"),
        ("/save", "/save: expected the name of a file"),
        (f"/load {tmp_path}/other", f"{tmp_path}/other: expected a chat of /save, format 1"),
        (f"/load {tmp_path}/none", f"Error: {tmp_path}/none: No such file or directory"),
        (f"/load {tmp_path}", f"{tmp_path}: Is a directory"),
        (f"/save {tmp_path}/notes", "notes: exists and is no chat of /save; give another name"),
        (f"/save {tmp_path}/no/where", f"Error: {tmp_path}/no/where: No such file or directory"),
        ("/HELP", "/HELP: no such command; type /help"),
        (f"/tools {tmp_path}/leaves.py", "leaves.py: cannot be run: SystemExit: 3"),
        (f"/tools {tmp_path}/none", f"{tmp_path}/none: expected a Python file with functions"),
        (f"/tools {tmp_path}/broken.py", "broken.py: cannot be run: ZeroDivisionError"),
        (f"/tools {tmp_path}/empty.py", "empty.py: expected public functions, got none"),
    ]
    result = chat("".join(f"{command}\n" for command, _ in commands) + "One?\n", "--quiet")
    assert (result.exit_code, result.stdout) == (1, ANSWER), "a script can see that some failed"
    for (_, says), line in zip(commands, result.stderr.splitlines(), strict=True):
        assert line.startswith("Error: ") and says in line
    assert (tmp_path / "notes").read_text() == "keep me"


def test_a_path_and_a_text_of_several_lines_are_messages(
    answering: scripted.ScriptedModel,
) -> None:
    result = chat('/etc/hosts is what?\n"""/reset\nis a command"""\n"""the end\nis missing\n')
    assert (result.exit_code, result.stdout) == (0, 3 * ANSWER)
    prompt = load_vocabulary().decode(answering.prompt)
    for said in ("/etc/hosts is what?", "/reset\nis a command", "the end\nis missing"):
        assert f"<|start|>user<|message|>{said}<|end|>" in prompt


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_a_saved_chat_is_its_owners_unless_it_was_shared(
    answering: scripted.ScriptedModel, tmp_path: Path, umask: int
) -> None:
    """Saving over a chat that only its owner could read let everybody read it."""
    new, shared = tmp_path / "new", tmp_path / "shared"
    (tmp_path / ".new.part").write_text("left by a killed one, for all to read")
    before = os.umask(umask)
    try:
        assert chat(f"One?\n/save {new}\n/save {shared}\n").exit_code == 0
        assert new.stat().st_mode & 0o777 == 0o600
        shared.chmod(0o640)
        assert chat(f"/load {new}\nTwo?\n/save {new}\n/save {shared}\n").exit_code == 0
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (new, shared)] == [0o600, 0o640]
    assert len(json.loads(shared.read_text())["messages"]) == 6


MESSAGE = {"role": "assistant", "content": "a", "channel": "final"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"system": 3}, "chat.system: 3"),
        ({"date": []}, "chat.date: []"),
        ({"reasoning": "huge"}, "'huge' is not a valid ReasoningEffort"),
        ({"messages": None}, "'NoneType' object is not iterable"),
        ({"messages": [MESSAGE, {**MESSAGE, "channel": 5}]}, "messages[1].channel: 5"),
        ({"messages": [{**MESSAGE, "content": None}]}, "messages[0]: role assistant with content"),
        ({"messages": [{**MESSAGE, "role": "system"}]}, "messages[0]: role system"),
        ({"messages": [{**MESSAGE, "role": "tool"}]}, "messages[0]: a tool's without a name"),
        ({"messages": [{**MESSAGE, "sampled": [1, 201_088]}]}, "messages[0].sampled: other things"),
        ({"messages": [{"role": "user"}]}, "no 'content'"),
        ({"format": 2}, "no chat"),
    ],
)
def test_a_damaged_chat_is_not_loaded(
    damage: dict[str, Any], says: str, answering: scripted.ScriptedModel, tmp_path: Path
) -> None:
    """Some of these were loaded, and ended the chat at the next question."""
    state = {"format": 1, "date": "2026-01-01", "reasoning": "low", "system": None}
    (tmp_path / "chat").write_text(json.dumps({**state, "messages": [MESSAGE], **damage}))
    result = chat(f"One?\n/load {tmp_path}/chat\nTwo?\n", "--quiet")
    assert (result.exit_code, result.stdout) == (1, 2 * ANSWER)
    (line,) = result.stderr.splitlines()
    assert "expected a chat of /save, format 1, got another file (" in line and says in line
    assert "One?" in load_vocabulary().decode(answering.prompt), "the present chat stays"


def test_a_file_whose_functions_cannot_be_offered_leaves_the_tools_as_they_are(
    answering: scripted.ScriptedModel, tmp_path: Path
) -> None:
    """The functions were taken and the descriptions were not: the next call ended the chat."""
    (tmp_path / "sky.py").write_text("def look() -> str:\n    return 'blue'\n")
    (tmp_path / "odd.py").write_text("def odd(*x: int) -> str:\n    return ''\n")
    answering.script = "<|channel|>commentary to=functions.look<|message|>{}<|call|>"
    result = chat(f"/tools {tmp_path}/sky.py\n/tools {tmp_path}/odd.py\n/tools\nSky?\n")
    assert "Error: odd(x): expected a parameter with a name" in result.stderr
    assert "\nTools: look.\n" in result.stderr and "look({}) = blue" in result.stderr


def test_what_tab_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a chat.json").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def offered(line: str) -> list[str]:
        return completions(line, commands=COMMANDS)

    assert [line.strip() for line in offered("/")] == COMMANDS and "/quit" in COMMANDS
    assert offered("/re") == ["/reset", "/reasoning "]
    assert offered("/reasoning m") == ["/reasoning medium"]
    assert offered("/load ") == ["/load a chat.json", "/load folder/"]
    assert offered("/save a c") == ["/save a chat.json"]
    assert offered("/load .") == ["/load .hidden"]
    assert offered("/tools ~/folder/") == ["/tools ~/folder/inner/"]
    assert offered("/load nowhere/") == offered("/stats ") == offered("hello") == []


def test_tools_of_a_file_are_called(answering: scripted.ScriptedModel, tmp_path: Path) -> None:
    (tmp_path / "sky.py").write_text(
        'from math import sin\ndef look(place: str) -> str:\n    """See."""\n    return "blue"\n'
    )
    answering.script = '<|channel|>commentary to=functions.look<|message|>{"place": "Rome"}<|call|>'
    result = chat(f"/tools {tmp_path}/sky.py\nSky?\n", "--quiet")
    assert result.stderr.startswith("Tools: look.\n")
    told = load_vocabulary().decode(answering.prompt)
    assert "// See.\ntype look" in told and told.count("<|message|>blue<|end|>") == 7
    warning = "Warning: 8 replies called tools, and none answered; ask again.\n"
    assert result.stderr.endswith(warning)
    again = chat(f"/tools {tmp_path}/sky.py\nSky?\n")
    assert 'look({"place": "Rome"}) = blue' in again.stderr


def test_a_wrong_temperature_is_a_mistake_of_the_command() -> None:
    result = CliRunner().invoke(main, ["chat", "--temperature", "nan"])
    assert result.exit_code == 2 and "temperature: expected a number >= 0" in result.stderr


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, script: str, home: Path) -> None:
        self._parent, child = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1",
               "MLX_GPTOSS_HOME": str(home)}  # fmt: skip
        command = [sys.executable, str(ROOT / "tests/scripted.py"), script, "chat", "-m", "x",
                   "--temperature", "0"]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            # a test run in the background ignores Ctrl-C, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(child)
        self.shown, self._seen = "", 0

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until a text: Python's readline sleeps through one just before it waits."""
        before = self._seen
        while text not in self.shown[before:]:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.until(text, within_s=5)

    def until(self, text: str, *, within_s: float = 120) -> str:
        """Wait for a text after the last one waited for; returns what is shown up to it."""
        end, before = time.monotonic() + within_s, self._seen
        while text not in self.shown[before:]:
            assert time.monotonic() < end, self.shown
            if select.select([self._parent], [], [], 1)[0]:
                try:
                    piece = os.read(self._parent, 65_536)
                except OSError:  # how Linux says that the last writer is gone
                    raise AssertionError(f"it ended: {self.shown}") from None
                self.shown += piece.decode().replace("\r\n", "\n")
        self._seen = self.shown.index(text, before) + len(text)
        return self.shown[before : self._seen]

    def type(self, text: str) -> None:
        os.write(self._parent, text.encode())

    def leave(self) -> int:
        self.type("\x04")
        code = self.process.wait(60)
        os.close(self._parent)
        return code


def test_a_terminal_keeps_its_history_and_ctrl_c_stops_the_answer_alone(tmp_path: Path) -> None:
    terminal = Terminal("slow", tmp_path)
    assert "Type /help for the commands" in terminal.until("> ")
    question, begin, end = "Count\tup\nto ten", "\x1b[200~", "\x1b[201~"
    if "libedit" in (readline.__doc__ or ""):  # cannot tell what is pasted
        question, begin, end = "Count\tup", "", ""
    terminal.type(f"{begin}{question}{end}\n")
    terminal.until("five, more")
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("(stopped)")
    terminal.until("> ")
    terminal.interrupt("(type /quit or Ctrl-D to leave)")
    terminal.until("> ")
    (tmp_path / "a folder").mkdir()
    terminal.type(f"/sa\t{tmp_path}/a\tchat\n")
    terminal.until("2 messages saved")
    terminal.until("> ")
    assert terminal.leave() == 0
    assert "Count\tup" in (tmp_path / "chat_history").read_text()
    asked, said = json.loads((tmp_path / "a folder/chat").read_text())["messages"]
    assert asked["content"] == question, "Tab completes commands only, a paste is one message"
    assert said["content"].startswith("One, two, three, four, five, more")
    assert (tmp_path / "chat_history").stat().st_mode & 0o77 == 0
