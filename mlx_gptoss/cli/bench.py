"""`mlx-gptoss bench`: measure a model, compare records, draw the report."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.console import Progress, note, show_log
from mlx_gptoss.cli.options import embedding_option

if TYPE_CHECKING:
    from mlx_gptoss.table import EmbeddingPlace

RESULTS = "benchmarks/results"


class _MeasuresByDefault(click.Group):
    """`bench MODEL` means `bench run MODEL`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_MeasuresByDefault)
def bench() -> None:
    """Measure prefill and decode, and compare.

    `bench MODEL` is short for `bench run MODEL`.
    """


@bench.command()
@click.argument("model")
@click.option(
    "--depths",
    default="512,2048,8192",
    show_default=True,
    metavar="N,...",
    help="Prompt lengths, after which decoding is measured.",
)
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    metavar="B,...",
    help="Rows decoded together, each with a prompt of its own.",
)
@click.option(
    "--answer",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens decoded in each run.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Runs of each depth and batch, after one that warms up; 5 make a spread worth stating.",
)
@click.option(
    "--compare",
    type=click.Choice(["mlx-lm"]),
    help="Measure this too, in turn, on the same weights in memory.",
)
@embedding_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "json", "csv"]),
    default="md",
    show_default=True,
    help="Of the result on standard output.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    is_flag=False,
    flag_value=Path(RESULTS),
    metavar="[FOLDER]",
    help=f"Keep the record, under the names of chip, memory and model; in {RESULTS} by itself.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")
def run(
    *,
    model: str,
    depths: str,
    batches: str,
    answer: int,
    repeats: int,
    compare: str | None,
    embedding: "EmbeddingPlace",
    form: str,
    save: Path | None,
    quiet: bool,
) -> None:
    """Measure MODEL: demo, 20b, 120b, a folder or a hub id."""
    from mlx_gptoss import bench as benchmark
    from mlx_gptoss import bench_text
    from mlx_gptoss.bench_record import file_name
    from mlx_gptoss.errors import BenchmarkError
    from mlx_gptoss.library import find_model
    from mlx_gptoss.machine import read_machine, read_memory_pressure

    if compare and embedding == "file":
        raise click.UsageError("--compare: mlx-lm needs the table in memory, not --embedding file")
    if compare and importlib.util.find_spec("mlx_lm") is None:
        raise BenchmarkError("--compare: mlx-lm is not installed here; run `pip install mlx-lm`")
    asked = {"depths": _numbers("--depths", depths), "batches": _numbers("--batch", batches)}
    folder, machine = find_model(model), read_machine()
    show_log(quiet=quiet)
    if save is not None:  # an hour later would be too late
        save.mkdir(parents=True, exist_ok=True)
    if machine.power_source == "Battery Power" or machine.low_power_mode:
        note("On battery or in low-power mode: this is slower than the machine.", quiet=quiet)
    if read_memory_pressure() not in (None, "normal"):
        note("Memory is short here: close other apps, or what is measured is swap.", quiet=quiet)
    record = benchmark.bench(
        model,
        folder,
        machine=machine,
        **asked,
        answer=answer,
        repeats=repeats,
        compare=compare is not None,
        embedding=embedding,
        progress=Progress(quiet=quiet).share,
    )
    forms = {"md": bench_text.as_markdown, "csv": bench_text.as_csv, "json": _json}
    click.echo(forms[form](record))
    if save is not None:
        _keep(record, save / file_name(record), quiet=quiet)


def _keep(record: dict[str, Any], path: Path, *, quiet: bool) -> None:
    """Write a record; the one that was there stays until this one is whole."""
    before = " over the one that was there" if path.exists() else ""
    part = path.with_suffix(".part")
    part.write_text(_json(record) + "\n", encoding="utf-8")
    part.replace(path)
    note(f"saved {path}{before}", quiet=quiet)


@bench.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def diff(*, before: Path, after: Path, as_json: bool) -> None:
    """Compare two saved records where they measured the same."""
    from mlx_gptoss.bench_text import difference, difference_text, read_record, unlike

    records = read_record(before), read_record(after)
    rows, others = difference(*records), unlike(*records)
    if as_json:
        click.echo(_json({"differences": rows, "unlike": others}))
        return
    click.echo(difference_text(rows))
    for line in others:
        note(f"The records are unlike in {line}")


@bench.command()
@click.argument("records", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("bench.html"),
    show_default=True,
    metavar="FILE",
    help="The page to write.",
)
def report(*, records: tuple[Path, ...], output: Path) -> None:
    """Draw RECORDS, or all of benchmarks/results, with limits and predictions, as one HTML page."""
    from mlx_gptoss.bench_report import as_html
    from mlx_gptoss.bench_text import read_record, records_of

    found = [read_record(path) for path in records] if records else records_of(Path(RESULTS))
    output.write_text(as_html(found), encoding="utf-8")
    click.echo(output)


def _numbers(option: str, text: str) -> list[int]:
    """A list of whole numbers from 1, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise click.UsageError(f"{option}: expected numbers from 1, such as 1,4, got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)
