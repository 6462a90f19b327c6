"""A runtime over a scripted model, for tests of what runtimes do with turns."""

import time
from typing import Any

import scripted

from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import harmony_engine

GREEDY = SamplingParams(temperature=0)
LONG = "<|channel|>final<|message|>" + "word " * 400 + "<|return|>"


def open_scripted(script: str, **options: Any) -> tuple[Runtime, scripted.ScriptedModel]:
    model = scripted.ScriptedModel(script)
    return open_model(model, **options), model


def open_model(model: Any, **options: Any) -> Runtime:
    return Runtime(lambda: harmony_engine(model), **options)


def wait_until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
