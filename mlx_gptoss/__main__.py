"""`mlx-gptoss` and `python -m mlx_gptoss`: the command line.

It takes a moment to import, and Ctrl-C then ends as it does later: quietly, with 130.
"""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from mlx_gptoss.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
