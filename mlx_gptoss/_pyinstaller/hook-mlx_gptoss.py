"""Carries what this package reads at run time, and what it imports by name."""

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("mlx_gptoss", includes=["data/*", "metal/*.metal", "metal/*.h"])
hiddenimports = ["llguidance.numpy", "llguidance.tiktoken"] if find_spec("llguidance") else []
excludedimports = ["mlx_lm"]  # the peer of our benchmarks
