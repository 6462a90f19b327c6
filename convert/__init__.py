"""Source checkpoints to MLX quantised arrays, imported as `mlx_gptoss.convert`.

    from mlx_gptoss.convert import convert_checkpoint

    convert_checkpoint("gpt-oss-20b", "gpt-oss-20b-mlx", dense="q8")

Needs numpy and nothing of MLX: bytes are moved, not computed with.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_gptoss.convert.pipeline import ConversionReport, convert_checkpoint
    from mlx_gptoss.convert.verify import KindError

_HOME = {
    "ConversionReport": "pipeline",
    "KindError": "verify",
    "convert_checkpoint": "pipeline",
}

__all__ = ["ConversionReport", "KindError", "convert_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_gptoss.convert' has no attribute {name!r}")
    return getattr(import_module(f"mlx_gptoss.convert.{_HOME[name]}"), name)
