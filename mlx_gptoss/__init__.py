"""OpenAI's gpt-oss models on Apple silicon.

Importing this package does nothing: no device, no network, no environment. The names below load
their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_gptoss._version import __version__

if TYPE_CHECKING:
    from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
    from mlx_gptoss.engine import Engine
    from mlx_gptoss.errors import GptOssError
    from mlx_gptoss.library import find_model
    from mlx_gptoss.model import Model, load_model
    from mlx_gptoss.runtime import Runtime
    from mlx_gptoss.sampling import SamplingParams
    from mlx_gptoss.turn import Reply, Turn, harmony_engine

_HOME = {
    "GPT_OSS_120B": "config",
    "GPT_OSS_20B": "config",
    "Engine": "engine",
    "GptOssError": "errors",
    "Model": "model",
    "ModelConfig": "config",
    "Reply": "turn",
    "Runtime": "runtime",
    "SamplingParams": "sampling",
    "Turn": "turn",
    "find_model": "library",
    "harmony_engine": "turn",
    "load_model": "model",
}

__all__ = [
    "GPT_OSS_20B",
    "GPT_OSS_120B",
    "Engine",
    "GptOssError",
    "Model",
    "ModelConfig",
    "Reply",
    "Runtime",
    "SamplingParams",
    "Turn",
    "__version__",
    "find_model",
    "harmony_engine",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_gptoss' has no attribute {name!r}")
    return getattr(import_module(f"mlx_gptoss.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
