"""Options that `generate` and `chat` share, so that they mean the same in both."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.console import note, show_log

if TYPE_CHECKING:
    from mlx_gptoss.sampling import SamplingParams

Command = Callable[..., None]

model_option = click.option(
    "-m",
    "--model",
    envvar="MLX_GPTOSS_MODEL",
    show_envvar=True,
    metavar="NAME",
    show_default="demo",
    help="demo, 20b, 120b, a folder or a hub id.",
)
reasoning_option = click.option(
    "--reasoning",
    type=click.Choice(["low", "medium", "high"]),
    default="medium",
    show_default=True,
    help="How long the model thinks before it answers.",
)
embedding_option = click.option(
    "--embedding",
    type=click.Choice(["memory", "file"]),
    default="memory",
    show_default=True,
    help="Where its table stays; `file` saves its memory, and a token waits for the one before.",
)
cache_dir_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Go on from what earlier runs computed: files that only you can read, with what was said, "
    "4 GiB at most.",
)

_SAMPLING = [
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=1.0,
        show_default=True,
        metavar="T",
        help="Randomness of the choice; 0 takes the most probable token.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=1.0,
        show_default=True,
        metavar="P",
        help="Keep the most probable tokens up to this mass.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=1),
        metavar="K",
        show_default="off",
        help="Keep this many most probable tokens.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(min=0, max=1, max_open=True),
        metavar="P",
        show_default="off",
        help="Keep tokens with this share of the best one's probability.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**64 - 1),
        metavar="N",
        show_default="a new one",
        help="The same seed gives the same answer.",
    ),
]


def max_tokens_option(of: str) -> Callable[[Command], Command]:
    """The option `--max-tokens`; `of` says in the help whose tokens are counted."""
    return click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        show_default="to the end of the context",
        help=f"Most tokens {of}, reasoning included.",
    )


def sampling_options(command: Command) -> Command:
    """Add the options of sampling; the command gets them as one `sampling: SamplingParams`."""

    @wraps(command)
    def with_sampling(
        *,
        temperature: float,
        top_p: float,
        top_k: int | None,
        min_p: float | None,
        seed: int | None,
        **others: Any,
    ) -> None:
        command(sampling=_params(temperature, top_p, top_k, min_p, seed), **others)

    options: Command = with_sampling
    for option in reversed(_SAMPLING):
        options = option(options)
    return options


def _params(
    temperature: float, top_p: float, top_k: int | None, min_p: float | None, seed: int | None
) -> "SamplingParams":
    from mlx_gptoss.sampling import SamplingParams

    try:
        return SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
        )
    except ValueError as error:  # nan and infinity pass the ranges of click
        raise click.UsageError(str(error)) from error


def chosen_model(model: str | None, *, quiet: bool) -> str:
    """The model asked for, or the demo, said aloud; also what will take a while the first time."""
    from mlx_gptoss.library import DEMO, model_store

    show_log(quiet=quiet)
    if model is None:
        note("No --model given: this is the demo, a tiny model to try things out.", quiet=quiet)
    if model in (None, DEMO):
        from mlx_gptoss.demo import is_unpacked

        if not is_unpacked(model_store()):
            note("Unpacking the demo, once: a few seconds.", quiet=quiet)
    return model or DEMO
