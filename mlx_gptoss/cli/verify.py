"""`mlx-gptoss verify`: is this copy, on this machine, the model that was published?"""

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.console import Progress
from mlx_gptoss.cli.options import embedding_option

if TYPE_CHECKING:
    from mlx_gptoss.table import EmbeddingPlace
    from mlx_gptoss.verify import Check

COLORS = {"ok": "green", "FAILED": "red", "skipped": "yellow"}


@click.command()
@click.argument("model")
@embedding_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(*, model: str, embedding: "EmbeddingPlace", as_json: bool, quiet: bool) -> None:
    """Check the files of MODEL, and this machine's arithmetic with its weights.

    MODEL is demo, 20b, 120b, a folder or a hub id. Exit 1 if anything disagrees.
    """
    from mlx_gptoss import verify as verification
    from mlx_gptoss.errors import VerificationError
    from mlx_gptoss.library import find_model
    from mlx_gptoss.machine import read_machine

    progress = Progress(quiet=quiet)
    limit_bytes, checks = read_machine().gpu_limit_bytes, []

    def show(phase: str, done: int, total: int) -> None:
        (progress.bytes if phase == "checking hashes" else progress.count)(phase, done, total)

    for check in verification.verify(
        find_model(model), limit_bytes=limit_bytes, embedding=embedding, progress=show
    ):
        checks.append(check)
        if not as_json:
            mark = click.style(f"{check.outcome:<9}", fg=COLORS[check.outcome])
            click.echo(f"{mark}{check.name:<11}{check.detail}")
    if as_json:
        click.echo(json.dumps({"model": model, "checks": [_plain(c) for c in checks]}, indent=2))
    wrong = [check for check in checks if check.outcome is verification.Outcome.FAILED]
    if wrong:
        raise VerificationError(f"{model}: {wrong[0].name}: {wrong[0].detail}")


def _plain(check: "Check") -> dict[str, Any]:
    """A check for JSON, which has no word for what is infinitely far: null."""
    numbers = {name: n if math.isfinite(n) else None for name, n in check.numbers.items()}
    return {**asdict(check), "numbers": numbers}
