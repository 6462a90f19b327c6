"""`mlx-gptoss download`: a published checkpoint into the hub cache, every byte proven."""

import click

from mlx_gptoss.cli.console import Progress, note, size


@click.command()
@click.argument("name")
@click.option(
    "--revision",
    default="main",
    show_default=True,
    metavar="REV",
    help="Branch, tag or commit of the repository.",
)
@click.option("--original", is_flag=True, help="Fetch OpenAI's own layout (original/) too.")
@click.option("--offline", is_flag=True, help="Check the local copy; use no network.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")
def download(*, name: str, revision: str, original: bool, offline: bool, quiet: bool) -> None:
    """Fetch the checkpoint NAME: 20b (13.8 GB), 120b (65.2 GB), or a hub id.

    Files go to the hub cache, which other tools share; what is there already is checked and kept,
    what was interrupted goes on. The folder's path is printed to stdout.
    """
    from mlx_gptoss import hub
    from mlx_gptoss.library import published_name

    short = published_name(name)
    repo_id = hub.PUBLISHED[short].repo_id if short else name
    done = hub.download(
        repo_id,
        revision=revision,
        original=original,
        offline=offline,
        progress=Progress(quiet=quiet).bytes,
    )
    note(
        f"{len(done.files)} files, {size(done.total_bytes)}, {size(done.fetched_bytes)} of it "
        f"fetched now; all hashes are right. Next: mlx-gptoss convert {name}",
        quiet=quiet,
    )
    click.echo(done.folder)
