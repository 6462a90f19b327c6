"""The command line in a process of its own: terminals, signals, and streams that close."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def start(script: str, *arguments: str, **options: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests/scripted.py"), script, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"} | dict(options.pop("env", {}))  # type: ignore[call-overload]
    # A test run in the background ignores Ctrl-C, and children inherit that.
    return subprocess.Popen(  # type: ignore[call-overload]
        command, env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
    )


def on_terminal(script: str, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and what a terminal shows, stdout and stderr as they come."""
    parent, child = pty.openpty()
    process = start(script, *arguments, stdin=child, stdout=child, stderr=child, env=env or {})
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65_536)
        except OSError:  # how Linux says that the last writer is gone
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    return process.wait(60), shown.decode().replace("\r\n", "\n")


def test_a_terminal_shows_reasoning_dimmed_before_the_answer() -> None:
    code, shown = on_terminal("answered", "generate", "--quiet", "Hi")
    assert code == 0
    assert re.fullmatch(r"(\x1b\[2m[^\x1b]+\x1b\[0m)+\n\nFour, naïvely: 4\.\n", shown), repr(shown)
    plain = re.sub(r"\x1b\[\d+m", "", shown)
    assert plain == "Two and two.\n\nFour, naïvely: 4.\n"


def test_no_color_is_honoured_on_a_terminal() -> None:
    code, shown = on_terminal("answered", "generate", "--quiet", "Hi", env={"NO_COLOR": "1"})
    assert (code, shown) == (0, "Two and two.\n\nFour, naïvely: 4.\n")


def test_a_dumb_terminal_gets_no_codes_and_whole_lines() -> None:
    """Those within editors show codes as text, and a line that is taken back twice."""
    code, shown = on_terminal("answered", "generate", "--quiet", "Hi", env={"TERM": "dumb"})
    assert (code, shown) == (0, "Two and two.\n\nFour, naïvely: 4.\n")
    code = "from mlx_gptoss.cli.console import Progress; p = Progress(); p.bytes('p', 1, 2)"
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "dumb"}
    subprocess.run([sys.executable, "-c", code], stderr=child, check=True, cwd=ROOT, env=env)
    os.close(child)
    assert os.read(parent, 999) == b"p: 1 bytes of 2 bytes\r\n"
    os.close(parent)


def test_ctrl_c_before_the_command_line_is_there() -> None:
    """A traceback of what was being imported."""
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from mlx_gptoss.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_terminal_is_not_steered_by_the_model() -> None:
    code, shown = on_terminal("steering", "generate", "--quiet", "Hi")
    assert (code, shown) == (0, "a\ufffd[31mb\ufffd\ufffdc\n\td\n")
    piped = run_process("steering", "generate", "--quiet", "Hi")
    assert piped.stdout == b"a\x1b[31mb\r\x07c\n\td\n", "a pipe gets what the model wrote"


def run_process(script: str, *arguments: str) -> subprocess.CompletedProcess:
    with start(script, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
               stdin=subprocess.DEVNULL) as process:  # fmt: skip
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_nor_is_stderr_steered_by_the_reasoning() -> None:
    code, shown = on_terminal("musing", "generate", "--quiet", "--show-reasoning", "Hi",
                              env={"NO_COLOR": "1"})  # fmt: skip
    assert code == 0 and "hm\ufffd]0;x\ufffd" in shown and "\x1b" not in shown, repr(shown)


def test_progress_never_wraps() -> None:
    code = "from mlx_gptoss.cli.console import Progress; Progress().bytes('p' * 99, 1, 2)"
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 20))
    subprocess.run([sys.executable, "-c", code], stderr=child, check=True, cwd=ROOT)
    os.close(child)
    assert os.read(parent, 999).decode() == "p" * 19
    os.close(parent)


def test_a_prompt_is_asked_for_where_none_can_come() -> None:
    code, shown = on_terminal("answered", "generate")
    assert code == 2
    assert shown.startswith(
        "Error: Missing PROMPT: give it as an argument, through a pipe, or as `-`"
    )


def test_ctrl_c_shows_what_came_and_exits_130() -> None:
    process = start("slow", "generate", "-m", "x", "Count", stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout and process.stderr
    assert process.stdout.read(4) == b"One,"
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n") and rest.count(b"more") < 150, "it went on to the end"
    assert err.strip() == b"", err


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    """As in `mlx-gptoss generate ... | head -c 3`."""
    process = start("slow", "generate", "--quiet", "Count", stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout and process.stderr
    assert process.stdout.read(3) == b"One"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and err == b"", err
    process.stderr.close()


@pytest.mark.parametrize(("closed", "prompt", "code"), [(">&- 2>&-", "Hi", 0), ("<&-", "", 2)])
def test_streams_that_were_closed_before_it_began(closed: str, prompt: str, code: int) -> None:
    line = f'exec "{sys.executable}" tests/scripted.py answered generate {prompt} {closed}'
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_closed_streams_do_not_keep_weights_from_being_read(tmp_path: Path) -> None:
    """The first shard was opened as number 0, which MLX takes for a failure."""
    source = write_checkpoint(tmp_path / "source", layers=2)
    model = convert_checkpoint(source, tmp_path / "model", verify=False).target
    line = f'exec "{sys.executable}" -c "{{}}" <&-'.format(
        f"from mlx_gptoss.cli import main; main(['generate', '-m', '{model}', 'Hi'])"
    )
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert "vocab_size: expected 201088" in done.stderr, "it was read, and is another model"
