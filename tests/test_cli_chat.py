"""The chat: commands, several lines, stopping, saving, a pipe and a real terminal."""

import json
import os
import pty
import re
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
    commands = [
        ("/no", "/no: no such command; type /help"),
        ("/reasoning huge", "/reasoning: expected low, medium or high, got 'huge'"),
        ("/save", "/save: expected the name of a file"),
        (f"/load {tmp_path}/other", f"{tmp_path}/other: expected a chat of /save, format 1"),
        (f"/load {tmp_path}/none", "No such file"),
        (f"/tools {tmp_path}/none", f"{tmp_path}/none: expected a Python file with functions"),
        (f"/tools {tmp_path}/broken.py", "broken.py: cannot be run: ZeroDivisionError"),
        (f"/tools {tmp_path}/empty.py", "empty.py: expected public functions, got none"),
    ]
    result = chat("".join(f"{command}\n" for command, _ in commands) + "One?\n", "--quiet")
    assert (result.exit_code, result.stdout) == (1, ANSWER), "a script can see that some failed"
    for (_, says), line in zip(commands, result.stderr.splitlines(), strict=True):
        assert line.startswith("Error: ") and says in line


def test_tools_of_a_file_are_called(answering: scripted.ScriptedModel, tmp_path: Path) -> None:
    (tmp_path / "sky.py").write_text(
        'from math import sin\ndef look(place: str) -> str:\n    """See."""\n    return "blue"\n'
    )
    answering.script = '<|channel|>commentary to=functions.look<|message|>{"place": "Rome"}<|call|>'
    result = chat(f"/tools {tmp_path}/sky.py\nSky?\n", "--quiet")
    assert result.stderr.startswith("Tools: look.\n")
    told = load_vocabulary().decode(answering.prompt)
    assert "// See.\ntype look" in told and told.count("<|message|>blue<|end|>") == 7
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

    def until(self, text: str) -> str:
        """Wait for a text after the last one waited for; returns what is shown up to it."""
        end, before = time.monotonic() + 120, self._seen
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
    terminal.type("Count\n")
    terminal.until("five, more")
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("(stopped)")
    terminal.until("> ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("(type /quit or Ctrl-D to leave)")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path}/chat\n")
    terminal.until("2 messages saved")
    terminal.until("> ")
    assert terminal.leave() == 0
    assert "Count" in (tmp_path / "chat_history").read_text()
    said = json.loads((tmp_path / "chat").read_text())["messages"][1]
    assert said["content"].startswith("One, two, three, four, five, more")
    assert (tmp_path / "chat_history").stat().st_mode & 0o77 == 0
