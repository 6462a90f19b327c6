"""The embedding in its file: the same numbers by every route, and less memory by its bytes."""

from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import TinyShape, write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.decode import Decoder
from mlx_gptoss.engine import Engine
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.kernels.selection import all_definitions
from mlx_gptoss.matrix import embed
from mlx_gptoss.model import load_model
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.table import FileTable

SHAPE = TinyShape(layers=2, hidden=128, inter=96, q_heads=12, kv_heads=3, experts=8, vocab=640)


@pytest.fixture(scope="module", params=["bf16", "q8"])
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("table")
    source = write_checkpoint(place / "source", shape=SHAPE)
    convert_checkpoint(source, place / "model", dense=request.param, verify=False)
    return place / "model"


def test_logits_and_tokens_are_the_same(folder):
    """A prompt past the window, step by step, several rows, and the engine's own loop."""
    here, there = (load_model(folder, dtype="float32", embedding=p) for p in ("memory", "file"))
    prompt = mx.array([[(7 * i * i + row) % 640 for i in range(139)] for row in range(2)])
    assert mx.array_equal(here(prompt), there(prompt))
    caches = [model.make_cache(2) for model in (here, there)]
    for step in range(3):
        logits = [
            m.next_logits(prompt[:, step : step + 1], c)
            for m, c in zip((here, there), caches, strict=True)
        ]
        assert mx.array_equal(*logits)
    answers = []
    for model in (here, there):
        with Engine(model).generate(
            prompt[0].tolist(), sampling=SamplingParams(seed=3), max_tokens=9
        ) as generation:
            answers.append(list(generation))
    assert answers[0] == answers[1]


def test_the_compiled_step_reads_the_rows_of_its_tokens(folder):
    """The step is traced once, though each token brings a table of its own."""
    tokens = []
    for place in ("memory", "file"):
        model = load_model(folder, embedding=place)
        cache = model.make_cache(3)
        model.next_logits(mx.array([[5, 9], [11, 2], [639, 0]]), cache)
        decoder = Decoder(model, kernels=all_definitions("no Metal"), allowed=mx.ones((640,)))
        # compiling takes longer than all the rest
        decoder._compiled.step = {False: partial(decoder.step, filtered=False)}
        sampling = [SamplingParams(temperature=t, seed=round(3 + t)) for t in (0, 1, 1.5)]
        decoding = decoder.start(cache, mx.array([3, 4, 638]), sampling=sampling)
        for _ in range(4):
            decoder.advance([decoding])
            tokens.append(decoding.state.token.tolist())
    assert tokens[:4] == tokens[4:]


def test_the_table_is_not_in_memory(folder):
    here, there = (load_model(folder, embedding=place) for place in ("memory", "file"))
    table = sum(
        a.nbytes
        for a in (here.embedding.weight, here.embedding.scales, here.embedding.offsets)
        if a is not None
    )
    resident = [sum(a.nbytes for a in model.arrays) for model in (here, there)]
    assert resident[0] - resident[1] == table


def test_rows_by_hand(folder):
    model = load_model(folder, embedding="file")
    assert isinstance(model.embedding, FileTable)
    whole = load_model(folder).embedding
    ids = mx.array([[639, 0, 17], [17, 5, 1]])
    rows = embed(mx.arange(6), model.embedding.rows(ids), mx.float32)
    assert mx.array_equal(rows, embed(ids.reshape(-1), whole, mx.float32))


def test_a_file_that_is_cut_while_it_is_used(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path / "s", shape=SHAPE), tmp_path / "m", verify=False)
    model = load_model(tmp_path / "m", embedding="file")
    for shard in (tmp_path / "m").glob("*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated since it was opened: expected 256 bytes"):
        model(mx.array([[1, 2, 3]]))


def test_no_such_place(folder):
    with pytest.raises(ValueError, match="embedding: expected one of memory, file, got 'disk'"):
        load_model(folder, embedding="disk")
