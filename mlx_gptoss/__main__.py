"""`python -m mlx_gptoss` is the command line."""

from mlx_gptoss.cli import main

main()
