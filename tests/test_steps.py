"""The engine gives the same tokens and leaves the same cache whichever way it takes its steps."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss.decode import Decoder
from mlx_gptoss.decode_state import ROWS
from mlx_gptoss.engine import Engine, Finish
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet, all_kernels
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.sampling import SamplingParams, packed
from mlx_gptoss.steps import ModelSteps

VOCAB = 320
ALLOWED = np.arange(VOCAB) % 7 != 3
PROMPT = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 90)]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def engine(kernels: KernelSet | None = None) -> Engine:
    model = tiny_model(
        TinyShape(
            layers=2, hidden=96, inter=32, q_heads=8, kv_heads=2, experts=8, chosen=3, vocab=VOCAB
        )
    )
    model.kernels = kernels or model.kernels
    return Engine(model, allowed=ALLOWED)


def definitions_as_kernels() -> KernelSet:
    """Definitions that count as kernels, so that the compiled step is taken without an emulator."""
    return KernelSet({stem: kernel.define for stem, kernel in KERNELS.items()}, {})


class Following:
    """A guide that lets an id follow only one that leaves another remainder by 3.

    Attributes:
        seen: What `count` said whenever it was asked.
    """

    def __init__(self, count: Callable[[], int] = int) -> None:
        self._count, self._last = count, 0
        self.seen: list[int] = []

    def allowed(self) -> np.ndarray:
        self.seen.append(self._count())
        return packed(np.arange(VOCAB) % 3 != self._last)

    def accept(self, token: int) -> None:
        assert token % 3 != self._last, "the mask was of another token"
        self._last = token % 3


SAMPLINGS = [SamplingParams(temperature=0), SamplingParams(temperature=0.9, seed=2**40 + 7)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_same_tokens_across_a_merge(sampling: SamplingParams) -> None:
    count = ROWS + 20
    plain = list(engine().generate(PROMPT, sampling=sampling, max_tokens=count))
    step = engine(definitions_as_kernels())
    assert list(step.generate(PROMPT, sampling=sampling, max_tokens=count)) == plain
    assert step._decoder is not None
    assert step._decoder.traces == count - 1  # one step for each token but the first


@pytest.mark.parametrize(
    ("count", "guided"),
    [(1, False), (2, False), (ROWS, False), (ROWS + 1, False), (ROWS + 2, False),
     (2, True), (ROWS, True), (ROWS + 1, True), (ROWS + 2, True)],
)  # fmt: skip
def test_a_stop_leaves_the_cache_of_the_tokens_fed(count: int, guided: bool) -> None:
    """The next turn, which goes on from that cache, is the same too; also around the merge."""
    turns = []
    for one in (engine(), engine(definitions_as_kernels())):
        guide = Following() if guided else None
        first = one.generate(PROMPT, sampling=SAMPLINGS[1], max_tokens=ROWS + 9, guide=guide)
        taken = [next(first) for _ in range(count)]
        first.close()
        assert first.finish is Finish.CANCELLED
        assert first.cache.offset == len(PROMPT) + count - 1
        text = [*PROMPT, *taken, 5, 6]
        second = one.generate(text, sampling=SAMPLINGS[0], max_tokens=12, cache=first.cache)
        turns.append((taken, list(second)))
    assert turns[0] == turns[1]


@pytest.mark.parametrize("guide", [None, Following], ids=str)
def test_a_stop_token_forgets_the_step_ahead(guide: type[Following] | None) -> None:
    def options() -> dict[str, Any]:
        return {"sampling": SAMPLINGS[0], "guide": guide and guide()}

    plain = list(engine().generate(PROMPT, max_tokens=30, **options()))
    stop = plain[-1]
    one = engine(definitions_as_kernels())
    generation = one.generate(PROMPT, stop=[stop], max_tokens=60, **options())
    found = list(generation)
    assert found == plain[: plain.index(stop) + 1]
    assert generation.finish is Finish.STOP
    assert generation.cache.offset == len(PROMPT) + len(found) - 1


def test_filters_are_applied_in_the_step() -> None:
    one = engine(definitions_as_kernels())
    for sampling in (
        SamplingParams(top_k=5, seed=1),
        SamplingParams(top_p=0.9, seed=1),
        SamplingParams(min_p=0.1, seed=1),
    ):
        expected = list(engine().generate(PROMPT, sampling=sampling, max_tokens=5))
        assert list(one.generate(PROMPT, sampling=sampling, max_tokens=5)) == expected
    assert one._decoder is not None
    assert one._decoder.traces


def test_no_snapshot_is_held_beside_the_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold the long stores, and every merge would copy them."""
    kept = []
    keep = ModelSteps.keep

    def noted(self: ModelSteps) -> None:
        keep(self)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(ModelSteps, "keep", noted)
    generation = engine(definitions_as_kernels()).generate(PROMPT, sampling=SAMPLINGS[0])
    next(generation)
    next(generation)
    assert [steps() for steps in kept] == [None]
    generation.close()


@pytest.mark.parametrize("guide", [None, Following], ids=str)
def test_an_engine_of_emulated_kernels(guide: type[Following] | None) -> None:
    """A step that is taken in two parts launches the same kernels."""

    def tokens(one: Engine) -> list[int]:
        given = guide and guide()
        return list(one.generate(PROMPT, sampling=SAMPLINGS[1], max_tokens=8, guide=given))

    expected = tokens(engine())
    with emulate(mode="plain") as session:
        assert tokens(engine(all_kernels())) == expected
    launched = [report.kernel for report in session.reports]
    decoding = next(n for n, name in enumerate(launched) if "gptoss_embed" in name)
    assert len(launched[decoding:]) == 7 * (6 + 7 + 3)


def test_what_is_dropped_holds_no_logits() -> None:
    """The logits of each turn that ended held those of its whole batch."""
    one = engine()

    def end_one_by_one() -> None:
        going = [one.generate([n, 5], sampling=SAMPLINGS[0], guide=Following()) for n in range(8)]
        while going:
            one.launch(going)
            for turn in going:
                next(turn)
            going.pop().close()

    end_one_by_one()
    mx.synchronize()
    held = mx.get_active_memory()
    assert len(one.dropped) == 2 * 8
    one.dropped.clear()
    assert held - mx.get_active_memory() < 4 * VOCAB


def test_a_guide_is_asked_while_the_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token it has seen last was fed before; but not where that merges.

    There the step was traced a second time, as a whole.
    """
    monkeypatch.setattr(Decoder, "_stepped", None)
    one = engine(definitions_as_kernels())
    guide = Following(lambda: one._decoder.traces if one._decoder else 0)
    count = ROWS + 4
    list(one.generate(PROMPT, sampling=SAMPLINGS[0], max_tokens=count, guide=guide))
    merging = ROWS + 1  # the prompt gives one token, and each of ROWS steps one more
    assert guide.seen == [at - (at == merging) for at in range(count)]
