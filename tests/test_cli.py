"""The command line: what goes to stdout, what to stderr, and how it ends."""

import contextlib
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import click
import pytest
import scripted
from click.testing import CliRunner, Result
from tiny import write_checkpoint

from mlx_gptoss import demo, library, memory, model
from mlx_gptoss.cli import main
from mlx_gptoss.cli.reply import Printer, Reasoning
from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.vocabulary import load_vocabulary

ROOT = Path(__file__).resolve().parent.parent
HELP = ROOT / "tests/goldens/help"  # `python tests/test_cli.py` writes them anew


def commands_of(group: click.Group, *names: str) -> Iterator[tuple[str, click.Command]]:
    """Every command, and those within it: `("bench run", ...)`; "" is the whole."""
    yield " ".join(names), group
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands_of(command, *names, name)
        else:
            yield " ".join((*names, name)), command


COMMANDS = dict(commands_of(main))


def help_of(command: str) -> str:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, [*command.split(), "--help"]).stdout


def golden_of(command: str) -> Path:
    return HELP / f"{'-'.join(command.split()) or 'mlx-gptoss'}.txt"


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> scripted.ScriptedModel:
    """Every model name is a model that answers `scripted.ANSWERED`."""
    monkeypatch.setattr(library, "find_model", library.find_model)  # so that both are put back
    monkeypatch.setattr(model, "load_model", model.load_model)
    monkeypatch.setattr(memory, "memory_of", memory.memory_of)
    return scripted.install(scripted.ANSWERED)


def run(*arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=input)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_committed(command: str) -> None:
    assert help_of(command) == golden_of(command).read_text(), "meant? python tests/test_cli.py"


def test_every_golden_has_its_command() -> None:
    assert set(HELP.iterdir()) == set(map(golden_of, COMMANDS))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_heavy_import(command: str) -> None:
    code = (
        "import sys; from mlx_gptoss.cli import main\n"
        f"try: main({[*command.split(), '--help']})\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'numpy', 'tiktoken', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_the_answer_alone_goes_to_stdout(answering: scripted.ScriptedModel) -> None:
    result = run("generate", "-m", "x", "What is two and two?")
    assert result.exit_code == 0
    assert result.stdout == "Four, naïvely: 4.\n"
    assert re.fullmatch(
        r"prompt \d+ tok [\d.]+ tok/s \| output 23 tok \(8 reasoning\) [\d.]+ tok/s \| "
        r"ttft \d+\.\d\d s \| peak [\d.]+ [kMG]B \| stop\n",
        result.stderr,
    ), result.stderr


def test_reasoning_goes_to_stderr_on_request(answering: scripted.ScriptedModel) -> None:
    result = run("generate", "-m", "x", "--show-reasoning", "--quiet", "Hi")
    assert (result.stdout, result.stderr) == ("Four, naïvely: 4.\n", "Two and two.\n")


def test_quiet_is_quiet(answering: scripted.ScriptedModel) -> None:
    result = run("generate", "--quiet", "Hi")
    assert (result.stdout, result.stderr) == ("Four, naïvely: 4.\n", "")


def test_the_demo_says_that_it_is_one(answering: scripted.ScriptedModel) -> None:
    assert run("generate", "Hi").stderr.startswith("No --model given: this is the demo, a tiny")
    env = {"MLX_GPTOSS_MODEL": "mine"}
    named = CliRunner().invoke(main, ["generate", "--json", "Hi"], env=env)
    assert "demo" not in named.stderr and json.loads(named.stdout)["model"] == "mine"


def test_unpacking_the_demo_is_said_once(
    answering: scripted.ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Unpacking the demo, once: a few seconds."
    assert said in run("generate", "Hi").stderr
    assert said in run("generate", "-m", "demo", "Hi").stderr
    assert said not in run("generate", "-m", "demo", "-q", "Hi").stderr
    assert said not in run("generate", "-m", "x", "Hi").stderr
    monkeypatch.setattr(demo, "is_unpacked", lambda store: True)
    assert said not in run("generate", "Hi").stderr


def test_json_is_one_object_with_the_promised_fields(answering: scripted.ScriptedModel) -> None:
    result = run("generate", "-m", "x", "--json", "--seed", "7", "Hi")
    reply = json.loads(result.stdout)
    assert {k: v for k, v in reply.items() if k not in ("timing", "peak_memory_bytes")} == {
        "text": "Four, naïvely: 4.",
        "reasoning": "Two and two.",
        "tool_calls": [],
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": len(answering.prompt),
            "cached_tokens": 0,
            "completion_tokens": len(scripted.tokens_of(scripted.ANSWERED)),
            "reasoning_tokens": len(
                scripted.tokens_of(scripted.ANSWERED.partition("<|start|>")[0])
            ),
        },
        "seed": 7,
        "model": "x",
    }
    assert set(reply["timing"]) == {"load_s", "ttft_s", "prefill_tok_per_s", "decode_tok_per_s"}
    assert all(value > 0 for value in reply["timing"].values())
    assert reply["peak_memory_bytes"] > 0


def test_raw_shows_every_token(answering: scripted.ScriptedModel) -> None:
    assert run("generate", "-m", "x", "--raw", "Hi").stdout == scripted.ANSWERED + "\n"


def test_raw_shows_a_character_that_was_cut_off() -> None:
    printer = Printer(Reasoning.HIDDEN)
    cut = load_vocabulary().encode("a\N{YI SYLLABLE BBURX}")  # the last character is several tokens
    assert load_vocabulary().decode_bytes(cut[:-1])[-1:] != b"a"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        printer.tokens(cut[:-1])
        printer.close()
    assert out.getvalue() == "a\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize("form", ["--raw", "--json"])
def test_show_reasoning_is_of_text_alone(form: str) -> None:
    result = run("generate", form, "--show-reasoning", "Hi")
    assert result.exit_code == 2
    assert "--show-reasoning: --raw and --json hold the reasoning anyway" in result.stderr


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_pipe_asks_what_an_argument_asks(answering: scripted.ScriptedModel, end: str) -> None:
    run("generate", "-m", "x", "-q", "Two\nlines")
    expected = answering.prompt
    run("generate", "-m", "x", "-q", input="Two\nlines" + end)
    assert answering.prompt == expected


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_can_come_through_a_pipe(
    answering: scripted.ScriptedModel, arguments: list[str]
) -> None:
    result = run("generate", "-q", *arguments, input="Grüße <|end|>\xff".encode("latin-1"))
    assert result.exit_code == 0
    told = load_vocabulary().decode(answering.prompt)
    assert told.endswith(
        "<|start|>user<|message|>Gr\ufffd\ufffde <|end|>\ufffd<|end|><|start|>assistant"
    )
    assert answering.prompt.count(200_007) == 2, "text of the user became a control token"


def test_the_prompt_is_harmony_with_effort_date_and_instructions(
    answering: scripted.ScriptedModel,
) -> None:
    run("generate", "--reasoning", "high", "--system", "Speak Latin.", "Hi")
    told = load_vocabulary().decode(answering.prompt)
    assert "\n\nReasoning: high\n\n" in told
    assert f"\nCurrent date: {date.today().isoformat()}\n" in told
    assert "<|start|>developer<|message|># Instructions\n\nSpeak Latin.<|end|>" in told
    run("generate", "Hi")
    told = load_vocabulary().decode(answering.prompt)
    assert "Reasoning: medium" in told and "developer" not in told


def test_tokens_that_run_out_before_the_answer_are_a_warning(
    answering: scripted.ScriptedModel,
) -> None:
    result = run("generate", "-m", "x", "--max-tokens", "4", "Hi")
    assert (result.exit_code, result.stdout) == (0, "")
    warning, stats = result.stderr.splitlines()
    assert warning == "Warning: the tokens ran out before the answer began; raise --max-tokens."
    assert stats.endswith("| length")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--raw", "--json", "Hi"], "--raw and --json exclude each other"),
        (["generate", "  "], "The prompt is empty"),
        (["generate", "--temperature", "-1", "Hi"], "-1.0 is not in the range x>=0"),
        (
            ["generate", "--temperature", "nan", "Hi"],
            "temperature: expected a number >= 0, got nan",
        ),
        (["generate", "--top-p", "0", "Hi"], "0.0 is not in the range 0<x<=1"),
        (["generate", "--top-k", "0", "Hi"], "0 is not in the range x>=1"),
        (["generate", "--min-p", "1", "Hi"], "1.0 is not in the range 0<=x<1"),
        (["generate", "--seed", "-3", "Hi"], "-3 is not in the range"),
        (["generate", "--max-tokens", "0", "Hi"], "0 is not in the range x>=1"),
        (["generate", "--reasoning", "huge", "Hi"], "'huge' is not one of 'low', 'medium', 'high'"),
        (["generate", "--no-such", "Hi"], "--no-such"),
        (["generate", "two", "words"], "Got unexpected extra argument (words)"),
        (["info"], "Missing argument 'MODEL'"),
        (["no-such-command"], "No such command 'no-such-command'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_exit_2(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ") and says in line
    assert re.search(r"; see `mlx-gptoss.*--help`$", line)


def test_no_arguments_show_the_help() -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == help_of("")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "-m", "20b", "Hi"], "run `mlx-gptoss download 20b` (13.8 GB, "),
        (["info", "no/such"], "run `mlx-gptoss download no/such`"),
        (["info", "nonsense"], "nonsense: expected demo, 20b, 120b, a folder or a hub id"),
        (
            ["download", "--offline", "120b"],
            "openai/gpt-oss-120b at main: offline, and not in the ",
        ),
        (["download", "nonsense"], "expected a hub id like openai/gpt-oss-20b, got 'nonsense'"),
    ],
)
def test_a_failure_is_one_line_and_exit_1(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("No --model")]
    assert line.startswith("Error: ") and says in line


def test_a_fault_of_the_system_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(library, "find_source", lambda name: tmp_path)
    env = {"MLX_GPTOSS_HOME": str(tmp_path / "file" / "store")}
    result = CliRunner().invoke(main, ["convert", "20b"], env=env)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {tmp_path / 'file' / 'store'}: Not a directory\n"


def test_a_model_of_another_vocabulary_is_refused(
    answering: scripted.ScriptedModel,
) -> None:
    answering.config.vocab_size = 1024
    result = run("generate", "-m", "x", "Hi")
    assert result.exit_code == 1
    assert "vocab_size: expected 201088, the vocabulary of gpt-oss, got 1024" in result.stderr


def test_info_tells_sizes_formats_origin_and_hashes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny-source", layers=3)
    convert_checkpoint(source, tmp_path / "model")
    told = run("info", "--hashes", "--quiet", str(tmp_path / "model"))
    assert (told.exit_code, told.stderr) == (0, "")
    lines = dict(line.strip().split(maxsplit=1) for line in told.stdout.splitlines())
    assert lines["layers"] == "3: 2 with a window of 128, 1 full"
    assert lines["width"] == "192, 8 query and 2 K,V heads of 64"
    assert lines["experts"].endswith("mxfp4")
    assert lines["origin"].startswith("tiny-source (") and lines["origin"].endswith(", verified")
    assert lines["hashes"].endswith("files, all as converted")
    facts = json.loads(run("info", "--json", str(tmp_path / "model")).stdout)
    assert facts["config"]["num_hidden_layers"] == 3
    assert sum(part["bytes"] for part in facts["parts"].values()) == facts["total_bytes"]
    assert facts["manifest"]["options"] == {"dense": "bf16"} and facts["intact_files"] is None


def test_info_of_a_source_folder_names_the_converter(tmp_path: Path) -> None:
    result = run("info", str(write_checkpoint(tmp_path / "source", layers=2)))
    assert result.exit_code == 1 and "mlx-gptoss convert" in result.stderr


def test_commands_are_short_and_documented() -> None:
    for name, command in COMMANDS.items():
        assert command.help, name
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help and option.help.endswith("."), f"{name} {option.opts}"


def write_help() -> None:
    HELP.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        golden_of(command).write_text(help_of(command))


if __name__ == "__main__":
    write_help()


@pytest.mark.parametrize("quiet", [False, True])
def test_the_log_is_shown_as_notes(*, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package says while a model loads; quietly, its warnings alone."""
    log = logging.getLogger("mlx_gptoss")

    def opened(*_: object, **__: object) -> None:
        log.info("this takes a while")
        log.warning("this is slow")
        raise GptOssError("the end")

    monkeypatch.setattr(library, "find_model", opened)
    options = ["--quiet"] if quiet else []
    result = CliRunner().invoke(main, ["generate", "-m", "20b", *options, "Hello"])
    said = [*([] if quiet else ["this takes a while"]), "this is slow", "Error: the end"]
    assert result.stderr.splitlines() == said
