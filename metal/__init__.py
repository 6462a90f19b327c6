"""The Metal sources of our kernels, one operation a file, imported as `mlx_gptoss.metal`."""

from importlib.resources import files


def source(name: str) -> str:
    """Return the text of a file of this folder, such as `"experts_swiglu.metal"`."""
    return files("mlx_gptoss.metal").joinpath(name).read_text(encoding="utf-8")
