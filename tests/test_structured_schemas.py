"""200 random schemas: whatever a grammar lets through, an independent validator finds valid."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from json_schemas import (
    COMPACT,
    COUNT,
    QUESTION,
    Schema,
    mistakes,
    options,
    random_schema,
    sampled,
    streamed,
)

from mlx_gptoss.demo import demo_model_path
from mlx_gptoss.engine import Engine
from mlx_gptoss.harmony import FinishReason, ResponseFormat
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.model import load_model
from mlx_gptoss.rules import TurnRules
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.steps import ModelSteps
from mlx_gptoss.structured import Guide
from mlx_gptoss.turn import harmony_engine
from mlx_gptoss.vocabulary import Special, load_vocabulary

BATCHES = 8
MOST = 300  # tokens of a drawn answer
DEMO_SEEDS = [0, 2, 4, 10, 17, 20]  # answered in few tokens


def drawn_answer(schema: Schema, *, seed: int) -> str | None:
    """An answer of tokens drawn evenly from those allowed; None if it does not come to an end."""
    rules = TurnRules(
        answers=ResponseFormat(name="thing", schema=schema), calls={}, must_call=False
    )
    guide, rng = Guide(rules), np.random.default_rng(seed)
    for token in load_vocabulary().encoding.encode(HEADER, allowed_special="all"):
        guide.accept(token)
    tokens: list[int] = []
    while len(tokens) < MOST:
        ids = np.flatnonzero(np.unpackbits(guide.allowed().view(np.uint8), bitorder="little"))
        token = int(ids[rng.integers(ids.size)])
        if token == Special.RETURN:
            return load_vocabulary().decode(tokens)
        guide.accept(token)
        tokens.append(token)
    return None


HEADER = "<|channel|>final <|constrain|>json<|message|>"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_answer_that_can_be_drawn_is_valid(batch: int) -> None:
    ended = 0
    for seed in range(batch, COUNT, BATCHES):
        schema = random_schema(seed)
        text = drawn_answer(schema, seed=seed)
        if text is not None:
            assert not mistakes(schema, text), f"seed {seed}: {text!r}"
            ended += 1
    assert ended >= 0.85 * COUNT / BATCHES


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    """The demo in float32, which x86-64 multiplies faster; no cache, so that nothing rounds."""
    folder = demo_model_path(tmp_path_factory.mktemp("store"))
    with Runtime(
        lambda: harmony_engine(load_model(folder, kernels="off", dtype="float32")), cache_bytes=0
    ) as runtime:
        yield runtime


def test_the_compiled_step_writes_the_same_answers(
    demo: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed beside a turn that is free, with the definitions in the place of kernels."""
    folder = demo_model_path(tmp_path)

    def load() -> Engine:
        model = load_model(folder, kernels="off", dtype="float32")
        model.kernels = KernelSet({stem: kernel.define for stem, kernel in KERNELS.items()}, {})
        return harmony_engine(model)

    monkeypatch.setattr(ModelSteps, "take", None)  # or the test compares a route with itself
    mx.disable_compile()  # which takes the CPU longer than all the rest
    try:
        with Runtime(load, cache_bytes=0) as runtime:
            free = {"max_tokens": 40, "sampling": SamplingParams(seed=1)}
            with runtime.stream("Hello!", **free) as other:
                schema = random_schema(0) | COMPACT
                reply = streamed(runtime, schema, seed=0, max_tokens=100)
                beside = other.reply()
    finally:
        mx.enable_compile()
    monkeypatch.undo()
    assert reply.finish_reason is FinishReason.STOP and not mistakes(schema, reply.text)
    again = demo.respond(QUESTION, **options(schema, seed=0, max_tokens=100))
    assert (again.text, sampled(again)) == (reply.text, sampled(reply))
    assert sampled(demo.respond("Hello!", **free)) == sampled(beside)


@pytest.mark.parametrize("seed", DEMO_SEEDS)
def test_the_demo_answers_by_the_schema_streamed_or_not(demo: Runtime, seed: int) -> None:
    """`benchmarks/schemas.py` asks for all 200."""
    schema = random_schema(seed) | COMPACT
    reply = streamed(demo, schema, seed=seed, max_tokens=100)
    assert reply.finish_reason is FinishReason.STOP
    assert not mistakes(schema, reply.text)
    if seed % 4 == 0 and reply.usage.completion_tokens < 25:
        again = demo.respond(QUESTION, **options(schema, seed=seed, max_tokens=100))
        assert (again.text, sampled(again)) == (reply.text, sampled(reply))
