"""`mlx-gptoss convert`: a downloaded or fine-tuned checkpoint into the runtime's format."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mlx_gptoss.cli.console import Progress, duration, note, size

if TYPE_CHECKING:
    from mlx_gptoss.convert import ConversionReport, KindError


@click.command()
@click.argument("source")
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option(
    "--dense",
    type=click.Choice(["bf16", "q8", "q4"]),
    default="bf16",
    show_default=True,
    help="How to store attention, embedding and unembedding: as they are, or 8 or 4-bit groups.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Read the result again and compare every weight with the source.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")
def convert(
    *,
    source: str,
    target: Path | None,
    dense: Literal["bf16", "q8", "q4"],
    verify: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE (20b, 120b, a folder or a hub id) into the folder TARGET.

    TARGET may be left out for 20b and 120b: the result then goes where `-m 20b` finds it. Experts
    keep their bits. What was interrupted goes on when the same command is given again. The
    folder's path is printed to stdout.
    """
    from mlx_gptoss.convert import convert_checkpoint
    from mlx_gptoss.library import find_source

    report = convert_checkpoint(
        find_source(source),
        target or _place_in_store(source),
        dense=dense,
        verify=verify,
        progress=Progress(quiet=quiet).bytes,
    )
    note(_summary(report), quiet=quiet)
    click.echo(report.target)


def _place_in_store(source: str) -> Path:
    """Where `-m 20b` looks; other sources have no name there."""
    from mlx_gptoss.library import converted_folder, published_name

    short = published_name(source)
    if short is None:
        raise click.UsageError("TARGET is needed unless SOURCE is 20b or 120b")
    folder = converted_folder(short)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _summary(report: "ConversionReport") -> str:
    lines = [
        f"source      {report.source}",
        f"weights     {size(report.weight_bytes)}, dense ones {report.dense}, written in "
        f"{duration(report.convert_s)}",
    ]
    if report.resumed_bytes:
        lines.append(f"resumed     {size(report.resumed_bytes)} were there already")
    if report.errors is None:
        lines.append("verified    no (--no-verify)")
        return "\n".join(lines)
    lines.append(f"verified    every weight, in {duration(report.verify_s)}; largest error:")
    return "\n".join([*lines, *(_error_line(error) for error in report.errors)])


def _error_line(error: "KindError") -> str:
    if error.bound == 0:
        return f"  {error.kind:<30}0, {error.unit}"
    return (
        f"  {error.kind:<30}{error.max_error:.3g} = {error.relative_error:.3f} {error.unit} "
        f"(bound {error.bound:g})"
    )
