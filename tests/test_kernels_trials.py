"""What the first-use check launches: what a model launches, with the model's own weights."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss import decode_state
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
from mlx_gptoss.kernels import selection
from mlx_gptoss.kernels.agreement import MOST_EXCESS, compare
from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes, Weights
from mlx_gptoss.kernels.matrix import RowBlocks, row_blocks
from mlx_gptoss.kernels.registry import END, KERNELS
from mlx_gptoss.kernels.selection import checked, disagreement, sizes_of
from mlx_gptoss.kernels.trials import ASKED, BATCHES, CUT, ROWS, cut_sizes, trials
from mlx_gptoss.layer_weights import unlike_layers, weights_of_layer
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.model import Model

MODELS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}


@pytest.fixture(autouse=True)
def emulator() -> Iterator[None]:
    """Rows above the slot are undefined by design."""
    with emulate(mode="plain", allow=("unwritten-output",)):
        yield


def own_weights(model: Model) -> list[Weights]:
    return [
        weights_of_layer(
            layer, embedding=model.embedding, norm=model.norm, unembedding=model.unembedding
        )
        for layer in unlike_layers(model.layers)
    ]


def test_trials_are_of_kernels_and_of_what_a_step_makes() -> None:
    assert set(KERNELS) >= {*ASKED, *CUT}
    assert ROWS == decode_state.ROWS
    for config in MODELS.values():
        sizes = sizes_of(config)
        assert (sizes.experts, sizes.rows) == (config.num_local_experts, ROWS)
        for stem in KERNELS:
            assert all(asked.base + asked.slot < sizes.capacity for asked in trials(stem, sizes))
    splits = {asked.splits for asked in trials("attention_decode", sizes_of(GPT_OSS_20B))}
    assert {splits_for(256), splits_for(131072)} <= splits


@pytest.mark.parametrize("columns", [2880, 4096])
def test_every_way_to_cut_a_batch_is_tried(columns: int) -> None:
    """Rows of a simdgroup and blocks of a threadgroup are constants of the compiled kernel."""

    def compiled(batch: int) -> RowBlocks:
        return replace(row_blocks(batch, columns), groups=0)

    assert {compiled(batch) for batch in BATCHES} == {compiled(batch) for batch in range(1, 33)}


OF_EXPERTS = [s for s in KERNELS if s.startswith(("expert", "route")) or s.endswith("pairs")]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stem", OF_EXPERTS)
def test_experts_of_the_published_models(stem: str, model: str) -> None:
    """32 and 128 experts are constants of what is compiled; here of few rows each."""
    kernel, sizes = KERNELS[stem], cut_sizes(stem, sizes_of(MODELS[model]))
    # a router's definition adds 2880 products in one float32
    most = MOST_EXCESS if stem.startswith("route") else 1
    for asked in trials(stem, sizes):
        found = compare(kernel, kernel.case(Inputs(asked, dtype=mx.bfloat16)))
        assert max(found) <= most, (asked, found)


def test_a_model_is_checked_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong for the weights of a model alone; what it read was no copy."""
    model, seen = tiny_model(), []
    true = KERNELS["experts_swiglu"]

    def wrong(x: mx.array, logits: mx.array, gate: Matrix, up: Matrix, **rest: Any) -> mx.array:
        seen.append(gate.weight)
        return true.launch(x, logits, gate, up, **rest) * (1 + 1e-3 * (seen[-1] is own))

    own = model.layers[0][1].gate.weight
    changed = replace(true, launch=lambda **given: wrong(**given))
    monkeypatch.setattr(selection, "KERNELS", {"experts_swiglu": changed})
    check = partial(checked, sizes_of(model.config), dtype=mx.float32, dense=["plain"], record=None)
    assert check(layers=[]) == {}
    assert "differs" in check(layers=own_weights(model))["experts_swiglu"]
    assert seen[-1] is own


def test_each_packing_of_a_layer_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's router is packed; the kernel that reads it wrongly is found."""
    model, true = tiny_model(TinyShape(layers=2)), KERNELS["route"]
    attention, moe = model.layers[1]
    parts = zip(("weight", "scales", "offsets"), mx.quantize(moe.router.weight), strict=True)
    router = Matrix(**dict(parts), bias=moe.router.bias, group_size=64, bits=4, mode="affine")
    model.layers[1] = attention, replace(moe, router=router)

    def wrong(router: Matrix, **rest: Any) -> tuple[mx.array, mx.array]:
        y, logits = true.launch(router=router, **rest)
        return y, logits + 1e-3 * (router.mode is not None)

    monkeypatch.setattr(selection, "KERNELS", {"route": replace(true, launch=wrong)})
    layers = own_weights(model)
    check = partial(checked, sizes_of(model.config), dtype=mx.float32, dense=["plain", "q4"])
    assert check(layers=layers[:1], record=None) == {}
    assert "differs" in check(layers=layers, record=None)["route"]


@pytest.mark.parametrize("dense", ["plain", "q4"])
def test_both_ends_of_a_long_vocabulary_are_compared(
    dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the last ids too, although the definition has none of those between."""
    monkeypatch.setitem(ASKED, "unembed", [{"batch": 2}])
    kernel, sizes = KERNELS["unembed"], replace(Sizes(), vocab=4 * END)

    def off_by(amount: mx.array) -> str:
        def launch(**given: Any) -> tuple[mx.array, mx.array]:
            logits, best = kernel.launch(**given)
            return logits + amount, best

        sources = [partial(Inputs, dtype=mx.float32, dense=dense)]
        return disagreement(replace(kernel, launch=launch), sizes, sources=sources)

    ids = mx.arange(sizes.vocab)
    assert off_by(mx.zeros_like(ids)) == ""
    assert "differs" in off_by(ids == 5)
    assert "differs" in off_by(ids == sizes.vocab - 1)


def test_a_near_tie_is_no_fault() -> None:
    """One choice that falls otherwise, with some numbers, is rounding; with all, it is a fault."""
    kernel, sources = KERNELS["embed"], [partial(Inputs, dtype=mx.float32)]
    off, calls = [1.0], []

    def launch(**given: Any) -> mx.array:
        calls.append(off[0])
        return kernel.launch(**given) + (off.pop() if len(off) > 1 else off[0])

    changed = replace(kernel, launch=launch)
    assert "differs" in disagreement(changed, Sizes(), sources=sources)
    asked = len(trials("embed", Sizes()))
    assert len(calls) == 2 * asked
    off[:] = [0.0, 1.0]
    assert disagreement(changed, Sizes(), sources=sources) == ""
    assert len(calls) == 4 * asked


def test_the_outcome_with_own_weights_counts_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that was loaded, `doctor` repeats the outcome; what it finds itself is less."""
    calls: list[str] = []

    def found(kernel: Any, sizes: Sizes, *, sources: Any) -> str:
        calls.append(kernel.stem)
        own = sources[0].keywords.get("weights")
        return "" if kernel.stem != "embed" else "with own" if own else "with random"

    monkeypatch.setattr(selection, "disagreement", found)
    model, record = tiny_model(), tmp_path / "kernels.json"
    check = partial(
        checked, sizes_of(model.config), dtype=mx.float32, dense=["plain"], record=record
    )
    assert check(layers=[]) == {"embed": "with random"}
    assert check(layers=own_weights(model)) == {"embed": "with own"}
    assert check(layers=[]) == {"embed": "with own"}
    assert len(calls) == 2 * len(KERNELS)


def test_the_record_knows_how_kernels_are_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed wrapper compiles another kernel from the same source."""
    monkeypatch.setattr(selection, "files", lambda _: tmp_path)
    keys = []
    for text in ("MOST_SIMDGROUPS = 12", "MOST_SIMDGROUPS = 8"):
        (tmp_path / "matrix.py").write_text(text)
        keys.append(selection._fingerprint(Sizes(), mx.float32, ["plain"], "random"))
    assert len(set(keys)) == 2
