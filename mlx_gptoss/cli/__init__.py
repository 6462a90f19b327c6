"""The command line `mlx-gptoss`: the only place of the package that prints.

Answers go to stdout, everything else to stderr. A failure is one line: exit 1 for ours, 2 for a
mistake in the command, 130 for Ctrl-C. Command modules import the runtime inside their commands, so
`--help` is immediate.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mlx_gptoss._version import __version__
from mlx_gptoss.cli.bench import bench
from mlx_gptoss.cli.chat import chat
from mlx_gptoss.cli.console import failure, is_dumb, note
from mlx_gptoss.cli.convert import convert
from mlx_gptoss.cli.doctor import doctor
from mlx_gptoss.cli.download import download
from mlx_gptoss.cli.generate import generate
from mlx_gptoss.cli.info import info
from mlx_gptoss.cli.plan import plan
from mlx_gptoss.cli.verify import verify
from mlx_gptoss.errors import GptOssError


class _Group(click.Group):
    """A group whose errors are one line each, with this program's exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "mlx-gptoss",
        *rest: Any,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        _occupy_standard_streams()
        if os.environ.get("NO_COLOR") or is_dumb():  # click itself looks at neither
            extra["color"] = False
        if not standalone_mode:
            return super().main(args, prog_name, *rest, standalone_mode=False, **extra)
        try:
            result = super().main(args, prog_name, *rest, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else prog_name
            _fail(f"{error.format_message().rstrip('.')}; see `{path} --help`", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (GptOssError, OSError) as error:
            _fail(failure(error), 1)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(130)
        sys.exit(result if isinstance(result, int) else 0)


def _occupy_standard_streams() -> None:
    """Give what was closed before we began to the null device.

    Else the next file that is opened takes its number, and is taken for a stream; MLX, for one,
    refuses to read a file whose number is 0.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _fail(message: str, code: int) -> NoReturn:
    note(f"Error: {' '.join(message.split())}")
    sys.exit(code)


@click.group("mlx-gptoss", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-gptoss")
def main() -> None:
    """Run OpenAI's gpt-oss models on a Mac: offline and exact."""


for _command in (generate, chat, download, convert, info, plan, doctor, verify, bench):
    main.add_command(_command)
