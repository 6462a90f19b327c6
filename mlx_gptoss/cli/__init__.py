"""The command line `mlx-gptoss`: the only place of the package that prints."""

import click

from mlx_gptoss._version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-gptoss")
def main() -> None:
    """Run OpenAI's gpt-oss models on a Mac: offline, exact, fast."""
