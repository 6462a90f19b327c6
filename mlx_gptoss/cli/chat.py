"""`mlx-gptoss chat`: a conversation in the terminal."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_gptoss.cli.console import failure, note
from mlx_gptoss.cli.options import (
    cache_dir_option,
    chosen_model,
    embedding_option,
    max_tokens_option,
    model_option,
    reasoning_option,
    sampling_options,
)
from mlx_gptoss.errors import GptOssError

if TYPE_CHECKING:
    from mlx_gptoss.cli.chat_input import Lines
    from mlx_gptoss.cli.chat_session import Session
    from mlx_gptoss.sampling import SamplingParams
    from mlx_gptoss.table import EmbeddingPlace

HELP = """\
/help               this list
/reset              begin anew; keeps system, reasoning and tools
/reasoning [LEVEL]  low, medium or high
/system [TEXT]      instructions that stand above the chat
/tools [FILE]       offer the functions of a Python file
/save FILE          write the chat to a file
/load FILE          go on with a chat from a file
/stats              tokens so far
/quit               leave; so does Ctrl-D
\"\"\"                 begins and ends a message of several lines, \\ at its end continues a line
Tab completes commands and names of files.
Ctrl-C stops an answer and keeps the chat."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
_COMMAND = re.compile(r"/[A-Za-z]*( .*)?\Z")  # on one line, and no path: those are messages


@click.command()
@model_option
@embedding_option
@reasoning_option
@click.option("--system", metavar="TEXT", help="Instructions that stand above the chat.")
@max_tokens_option("of one answer")
@sampling_options
@cache_dir_option
@click.option("--show-reasoning", is_flag=True, help="Print the reasoning to stderr.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics or notes.")
def chat(
    *,
    model: str | None,
    embedding: "EmbeddingPlace",
    reasoning: str,
    system: str | None,
    max_tokens: int | None,
    sampling: "SamplingParams",
    cache_dir: Path | None,
    show_reasoning: bool,
    quiet: bool,
) -> None:
    """Talk with a model; type /help for what else can be done.

    Lines of a pipe are messages, answered one after the other.
    """
    from mlx_gptoss.cli.chat_input import open_lines
    from mlx_gptoss.cli.chat_session import Session
    from mlx_gptoss.runtime import Runtime

    model = chosen_model(model, quiet=quiet)
    opened = Runtime.open(model, embedding=embedding, cache_dir=cache_dir)
    with opened as runtime, open_lines(COMMANDS) as lines:
        session = Session(
            runtime,
            reasoning=reasoning,
            instructions=system,
            max_tokens=max_tokens,
            sampling=sampling,
            show_reasoning=show_reasoning,
            quiet=quiet,
        )
        failed = _converse(session, lines)
    if failed and not lines.is_interactive:
        sys.exit(1)


def _converse(session: "Session", lines: "Lines") -> bool:
    """Take messages and commands to the end; say whether any failed."""
    if lines.is_interactive:
        note("Type /help for the commands, Ctrl-D to leave.", quiet=session.quiet)
    failed = False
    for text in lines:
        if text == "/quit":
            break
        try:
            if _COMMAND.match(text):
                note(_command(session, text))
            else:
                session.ask(text)
        except (GptOssError, OSError) as error:
            failed = True
            note(f"Error: {failure(error)}")
        except KeyboardInterrupt:
            note("(stopped)")
            if not lines.is_interactive:
                raise
    return failed


def _command(session: "Session", text: str) -> str:
    """Do what a command says; returns what to tell."""
    name, _, argument = text.partition(" ")
    argument = argument.strip()
    match name:
        case "/help":
            return HELP
        case "/reset":
            return session.reset()
        case "/reasoning":
            return session.set_reasoning(argument)
        case "/system":
            return session.set_instructions(argument)
        case "/tools":
            return session.set_tools(argument)
        case "/save":
            return session.save(argument)
        case "/load":
            return session.load(argument)
        case "/stats":
            return session.stats()
    raise GptOssError(f"{name}: no such command; type /help for those there are")
