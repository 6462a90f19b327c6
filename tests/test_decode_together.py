"""Generations that share compiled steps: each has the tokens and the cache that it has alone.

They come and go, merge at different times, drop steps, and have caches of different length.
"""

import gc
import weakref
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss import decode
from mlx_gptoss.cache import ModelCache
from mlx_gptoss.decode import Decoder
from mlx_gptoss.decode_state import ROWS, Decoding
from mlx_gptoss.engine import Engine
from mlx_gptoss.errors import CacheError
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet, all_definitions, all_kernels
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams, packed

VOCAB = 320
SAMPLINGS = [
    SamplingParams(temperature=0, seed=0),
    SamplingParams(temperature=0.9, seed=2**40 + 7),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.9, seed=11),
]
LENGTHS = [3, 250, 130]  # capacities of 256, 256 and 512 after a while


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(
        TinyShape(
            layers=2, hidden=96, inter=32, q_heads=8, kv_heads=2, experts=8, chosen=3, vocab=VOCAB
        )
    )


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Without `mx.compile`: the CPU's compiler takes a second for each fused operation."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def decoder_of(model: Model, kernels: KernelSet | None = None) -> Decoder:
    kernels = kernels or all_definitions("the definitions are tested here")
    return Decoder(model, kernels=kernels, allowed=mx.ones((VOCAB,), mx.uint8))


@dataclass
class Row:
    """One generation and what it wrote."""

    decoding: Decoding
    cache: ModelCache
    tokens: list[int] = field(default_factory=list)


def started(decoder: Decoder, place: int) -> Row:
    length, sampling = LENGTHS[place % 3], SAMPLINGS[place % 3]
    prompt = np.random.default_rng(place).integers(0, VOCAB, length).tolist()
    cache = decoder.model.make_cache()
    if len(prompt) > 1:
        decoder.model.hidden(mx.array([prompt[:-1]]), cache)
    token = mx.array(prompt[-1:], dtype=mx.int32)
    decoding = decoder.start(cache, token, sampling=[sampling])
    return Row(decoding, cache)


def step(decoder: Decoder, rows: list[Row]) -> None:
    """One step that counts."""
    decoder.advance([row.decoding for row in rows])
    for row in rows:
        row.decoding.keep()
        row.tokens.append(int(row.decoding.state.token))


def ended(row: Row) -> list[mx.array]:
    """The cache after the end, but for the room that stores keep."""
    row.decoding.finish()
    nothing = mx.zeros((1, 2, 1, 64))
    return [array for layer in row.cache for array in layer.extend(nothing, nothing)]


def alone(model: Model, place: int, count: int) -> tuple[list[int], list[mx.array]]:
    decoder = decoder_of(model)
    row = started(decoder, place)
    for _ in range(count):
        step(decoder, [row])
    return row.tokens, ended(row)


def assert_as_alone(model: Model, place: int, row: Row) -> None:
    tokens, kept = alone(model, place, len(row.tokens))
    assert row.tokens == tokens, place
    for layer, (got, expected) in enumerate(zip(ended(row), kept, strict=True)):
        assert mx.array_equal(got, expected), f"row {place}, array {layer}"


def test_rows_come_go_and_merge_at_their_own_times(model: Model) -> None:
    """Row 1 joins 9 steps late, row 2 is absent for a while; all merge, in different steps."""
    decoder, merges = decoder_of(model), []
    rows = [started(decoder, place) for place in range(3)]
    for at in range(ROWS + 24):
        present = [rows[0], *([rows[1]] if at >= 9 else []), *([rows[2]] if at % 50 < 45 else [])]
        merges += [(at, rows.index(r)) for r in present if r.decoding.state.slot == ROWS]
        step(decoder, present)
    assert [place for _, place in merges] == [0, 1, 2] and len({at for at, _ in merges}) == 3
    assert [len(row.tokens) for row in rows] == [152, 143, 137]
    for place, row in enumerate(rows):
        assert_as_alone(model, place, row)


def test_a_batch_is_traced_once_for_its_shapes(model: Model) -> None:
    """Compiled: three rows and two of them, in turn, are two traces."""
    decoder = decoder_of(model)
    rows = [started(decoder, place) for place in range(3)]
    mx.enable_compile()
    for at in range(12):
        step(decoder, rows if at % 4 else rows[:0:-1])
    mx.disable_compile()
    assert decoder.traces == 2
    for place, row in enumerate(rows):
        assert row.tokens == alone(model, place, len(row.tokens))[0], place


def test_a_dropped_step_is_the_generations_own(model: Model) -> None:
    """One drops the step that all took, and ends; the others' counts."""
    decoder = decoder_of(model)
    rows = [started(decoder, place) for place in range(3)]
    for _ in range(20):
        step(decoder, rows)
    decoder.advance([row.decoding for row in rows])
    assert_as_alone(model, 1, rows[1])
    for row in (rows[0], rows[2]):
        row.decoding.keep()
        row.tokens.append(int(row.decoding.state.token))
    for _ in range(4):
        step(decoder, [rows[2], rows[0]])
    for place in (0, 2):
        assert_as_alone(model, place, rows[place])


def test_a_generation_that_stays_behind_holds_no_other_rows(model: Model) -> None:
    decoder = decoder_of(model)
    rows = [started(decoder, place) for place in range(3)]
    step(decoder, rows)
    decoder.advance([row.decoding for row in rows])
    batch = weakref.ref(rows[1].decoding.state.step)
    assert batch() is rows[0].decoding.state.step
    step(decoder, rows[:1])
    step(decoder, rows[:1])
    gc.collect()
    assert batch() is None, "two generations wait, with a step that they can still drop"
    assert rows[1].decoding.state.step.token.shape == (1,)
    assert_as_alone(model, 1, rows[1])


def test_traces_are_not_kept_for_ever(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(model)
    monkeypatch.setattr(decode, "MOST_TRACES", 3)
    row, compiled = started(decoder, 0), []
    for _ in range(7):
        step(decoder, [row])
        compiled.append(decoder._compiled)
    assert len({id(function) for function in compiled}) == 3
    assert_as_alone(model, 0, row)


def test_padded_rows_are_refused(model: Model) -> None:
    """They attended to their padding: the kernels know nothing of it."""
    cache = model.make_cache(2, left_padding=[0, 3])
    model.hidden(mx.array([[5, 6, 7, 8], [0, 0, 0, 9]]), cache)
    with pytest.raises(CacheError, match=r"expected rows without padding, got \[0, 3\] tokens"):
        decoder_of(model).start(cache, mx.array([1, 2]), sampling=[SAMPLINGS[0]] * 2)


def test_emulated_kernels_step_together(model: Model) -> None:
    """Rows at other places of their windows, one of them past it; one leaves.

    Together they read an expert once for the rows that chose it, alone row by row.
    """
    with emulate(mode="plain") as session:
        decoder = decoder_of(model, all_kernels())
        rows = [started(decoder, place) for place in range(3)]
        for at in range(5):
            step(decoder, rows if at < 3 else rows[1:])
        layers = model.config.num_hidden_layers
        assert sum("experts_down_grouped" in r.kernel for r in session.reports) == 5 * layers
        for place, row in enumerate(rows):
            lone = started(decoder, place)
            for _ in row.tokens:
                step(decoder, [lone])
            assert lone.tokens == row.tokens, place
            for got, expected in zip(ended(row), ended(lone), strict=True):
                assert mx.array_equal(got, expected), place
    for place, row in enumerate(rows):
        assert row.tokens == alone(model, place, len(row.tokens))[0], place


def test_more_rows_than_keep_their_bits(model: Model) -> None:
    """A step of 32 rows is made of MLX's products; of 16, and of 17 again, after leaves and joins.

    They add otherwise, so the last bits differ; the tokens, drawn with each row's own noise, and
    their probabilities are the rows' own.
    """
    dense = {"norm_qkv_rope", "out_residual", "route", "unembed"}
    ran_of = {
        16: dense | {"experts_sum"},
        17: {"route", "experts_sum"},
        32: {"route", "expert_dispatch"},
    }
    places, marks = range(32), set[str]().union(*ran_of.values())
    with emulate(mode="plain") as session:
        decoder = decoder_of(model, all_kernels())
        rows = [started(decoder, place) for place in places]
        logprobs: list[list[float]] = [[] for _ in rows]
        for present in (places, range(9, 25), range(8, 25), places):
            session.reports.clear()
            step(decoder, [rows[place] for place in present])
            for place in present:
                logprobs[place] += np.array(rows[place].decoding.state.rows.logprob).tolist()
            ran = {stem for stem in marks for r in session.reports if f"gptoss_{stem}" in r.kernel}
            assert ran == ran_of[len(present)]
        for place in (0, 8, 24, 31):
            lone = started(decoder, place)
            for token, logprob in zip(rows[place].tokens, logprobs[place], strict=True):
                step(decoder, [lone])
                assert lone.tokens[-1] == token, place
                assert abs(lone.decoding.state.rows.logprob.item() - logprob) < 1e-4, place
            for got, expected in zip(ended(rows[place]), ended(lone), strict=True):
                assert mx.allclose(got, expected, atol=1e-4), place


class Following:
    """A guide that lets an id follow only one of the other parity."""

    def __init__(self) -> None:
        self._parity = 0

    def allowed(self) -> np.ndarray:
        return packed(np.arange(VOCAB) % 2 == self._parity)

    def accept(self, token: int) -> None:
        assert token % 2 == self._parity, "the mask was another turn's, or of another token"
        self._parity = 1 - self._parity


def test_guided_and_free_turns_take_their_steps_together(model: Model) -> None:
    """With and without filters, past a merge of each kind, as by the model's own operations alone.

    One begins late, one is away for a while, one is cancelled. In each round the layers are taken
    once, for all.
    """
    by_kernels = copy(model)
    by_kernels.kernels = KernelSet({stem: k.define for stem, k in KERNELS.items()}, {})
    samplings = [*SAMPLINGS, SamplingParams(top_k=9, seed=3), *SAMPLINGS[1:]]
    prompts = [np.random.default_rng(9 + n).integers(0, VOCAB, 30 + n).tolist() for n in range(6)]
    counts = [12, 30, ROWS + 9, 21, ROWS + 5, 24]

    def generations(engine: Engine) -> list[Any]:
        return [
            engine.generate(
                prompt, sampling=sampling, max_tokens=count, guide=Following() if at > 3 else None
            )
            for at, (prompt, sampling, count) in enumerate(
                zip(prompts, samplings, counts, strict=True)
            )
        ]

    engine = Engine(by_kernels)
    together = generations(engine)
    taken: list[list[int]] = [[] for _ in together]
    rounds = 0
    while any(one.finish is None for one in together):
        if rounds == 20:
            together[5].close()
        late, away = rounds < 3, 8 <= rounds < 12
        present = [at for at in range(6) if not (late and at == 4) and not (away and at == 1)]
        engine.launch([together[at] for at in present])
        for at in present:
            taken[at] += [token for token in [next(together[at], None)] if token is not None]
        rounds += 1
    expected = [list(one) for one in generations(Engine(model))]
    expected[5] = expected[5][:20]
    assert taken == expected
    assert taken[4] == list(generations(Engine(by_kernels))[4])
    assert [len(tokens) for tokens in taken] == [*counts[:5], 20]
    assert engine._decoder is not None
    assert rounds <= engine._decoder.traces < rounds + 4, "two merge, each beside others"
