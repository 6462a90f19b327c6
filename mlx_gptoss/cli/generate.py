"""`mlx-gptoss generate`: one prompt, one answer."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_gptoss.cli.console import Progress, note
from mlx_gptoss.cli.options import (
    cache_dir_option,
    chosen_model,
    embedding_option,
    max_tokens_option,
    model_option,
    reasoning_option,
    sampling_options,
)

if TYPE_CHECKING:
    from mlx_gptoss.engine import Engine
    from mlx_gptoss.harmony.ledger import Prompt
    from mlx_gptoss.prefix_cache import PrefixCache, Slot
    from mlx_gptoss.sampling import SamplingParams
    from mlx_gptoss.table import EmbeddingPlace
    from mlx_gptoss.turn import Turn


@click.command()
@click.argument("prompt", required=False)
@model_option
@embedding_option
@reasoning_option
@click.option("--system", metavar="TEXT", help="Instructions that stand above the prompt.")
@max_tokens_option("to generate")
@sampling_options
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--raw", is_flag=True, help="Print the sampled tokens with their harmony markers.")
@click.option("--show-reasoning", is_flag=True, help="Print the reasoning to stderr.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics, progress or notes.")
def generate(
    *,
    prompt: str | None,
    model: str | None,
    embedding: "EmbeddingPlace",
    reasoning: str,
    system: str | None,
    max_tokens: int | None,
    sampling: "SamplingParams",
    cache_dir: Path | None,
    as_json: bool,
    raw: bool,
    show_reasoning: bool,
    quiet: bool,
) -> None:
    """Answer PROMPT, or what a pipe or `-` brings on standard input.

    The answer goes to stdout; on a terminal the model's reasoning precedes it, dimmed.
    """
    from mlx_gptoss.library import find_model

    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    if show_reasoning and (raw or as_json):
        raise click.UsageError("--show-reasoning: --raw and --json hold the reasoning anyway")
    text = _prompt_text(prompt)
    model = chosen_model(model, quiet=quiet)
    rendered = _render(text, system=system, reasoning=reasoning)
    folder = find_model(model)
    max_tokens = _granted(folder, embedding, rendered, max_tokens)
    engine, load_s = _load(folder, embedding)
    with _prefixes(engine, folder, cache_dir) as prefixes:
        turn, slot = _turn(engine, rendered, prefixes, sampling, max_tokens, quiet)
        if as_json:
            click.echo(_json(turn, model, load_s))
        else:
            _print(turn, raw=raw, show_reasoning=show_reasoning)
        _report(turn, quiet=quiet)
        slot.note((*rendered.tokens, *turn.tokens))
        prefixes.give_back(slot)


def _prompt_text(prompt: str | None) -> str:
    """The prompt of the command line, or of standard input."""
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("Missing PROMPT: give it as an argument, through a pipe, or as `-`")
    text = "-" if prompt is None else prompt
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        text = text.rstrip("\r\n")  # of the last line, as in a shell's $(...): not of the prompt
    if not text.strip():
        raise click.UsageError("The prompt is empty")
    return text


def _granted(
    folder: Path, embedding: "EmbeddingPlace", prompt: "Prompt", max_tokens: int | None
) -> int | None:
    """`max_tokens`, or as many as the memory has room for; what does not fit is refused."""
    from mlx_gptoss.memory import memory_of

    memory = memory_of(folder, limit_bytes=None, embedding=embedding)
    return max_tokens if memory is None else memory.grant(len(prompt.tokens), max_tokens)[1]


def _load(folder: Path, embedding: "EmbeddingPlace") -> "tuple[Engine, float]":
    """The engine of a model, and how long loading took."""
    from mlx_gptoss.library import kernel_record
    from mlx_gptoss.model import load_model
    from mlx_gptoss.turn import harmony_engine

    began = time.perf_counter()
    model = load_model(folder, embedding=embedding, kernel_record=kernel_record())
    return harmony_engine(model), time.perf_counter() - began


@contextmanager
def _prefixes(engine: "Engine", folder: Path, cache_dir: Path | None) -> "Iterator[PrefixCache]":
    """What earlier runs computed, if they kept it; nothing is kept in memory for later turns."""
    from mlx_gptoss.cache_folder import open_folder
    from mlx_gptoss.prefix_cache import PrefixCache

    files = open_folder(cache_dir, folder, engine.model) if cache_dir is not None else None
    prefixes = PrefixCache(engine.model.make_cache, budget_bytes=0, files=files)
    try:
        yield prefixes
    finally:
        prefixes.close()


def _render(text: str, *, system: str | None, reasoning: str) -> "Prompt":
    """The prompt; today's date is told, as the models were trained with one."""
    from mlx_gptoss import harmony
    from mlx_gptoss.harmony.ledger import prepare_prompt

    content = harmony.SystemContent(
        effort=harmony.ReasoningEffort(reasoning), date=date.today().isoformat()
    )
    messages = [harmony.system(content)]
    if system:
        messages.append(harmony.developer(harmony.DeveloperContent(instructions=system)))
    return prepare_prompt([*messages, harmony.user(text)])


def _turn(
    engine: "Engine",
    prompt: "Prompt",
    prefixes: "PrefixCache",
    sampling: "SamplingParams",
    max_tokens: int | None,
    quiet: bool,
) -> "tuple[Turn, Slot]":
    from mlx_gptoss.turn import Turn

    progress, head = Progress(quiet=quiet), prompt.ends[-2]  # the question is the last message
    found = prefixes.search(prompt, head=head).result()
    slot = prefixes.take(prompt, head=head, found=found)

    def on_prefill(done: int, total: int) -> None:
        prefixes.note(slot, prompt, head=head)
        progress.share("reading the prompt", done, total)

    turn = Turn(
        engine,
        prompt.tokens,
        sampling=sampling,
        max_tokens=max_tokens,
        cache=slot.cache,
        breaks=slot.marks,
        on_prefill=on_prefill,
    )
    return turn, slot


def _print(turn: "Turn", *, raw: bool, show_reasoning: bool) -> None:
    """Print a turn while it is written; what came is shown whatever ends it."""
    from mlx_gptoss.cli.reply import Printer, reasoning_place

    printer = Printer(reasoning_place(show_reasoning=show_reasoning))
    try:
        for event in turn.events():
            printer.tokens(turn.tokens) if raw else printer.event(event)
    finally:
        printer.close()


def _json(turn: "Turn", model: str, load_s: float) -> str:
    from mlx_gptoss.cli.reply import as_json

    return as_json(turn.reply(), model=model, load_s=load_s)


def _report(turn: "Turn", *, quiet: bool) -> None:
    """What the turn cost; and a word where the tokens ran out before the answer."""
    from mlx_gptoss.cli.reply import stats_line

    reply = turn.reply()
    if not reply.text and reply.finish_reason == "length":
        note("Warning: the tokens ran out before the answer began; raise --max-tokens.")
    note(stats_line(reply), quiet=quiet)
