"""A kernel that fails or differs costs a warning and its speed, never a wrong token or a crash."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss.errors import KernelError
from mlx_gptoss.kernel_faults import with_all_kernels
from mlx_gptoss.kernels import registry, selection, trials
from mlx_gptoss.kernels.agreement import compare
from mlx_gptoss.kernels.inputs import Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import (
    KernelSet,
    all_definitions,
    choose_kernels,
    dense_form,
)
from mlx_gptoss.kernels.trials import ROWS
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.model import dense_forms

DENSE = {"embed", "norm_qkv_rope", "out_residual", "route", "route_prefill", "unembed"}
SIZES = Sizes(hidden=128, inter=96, vocab=256, capacity=64, base=50, slot=5, rows=ROWS)


def choose(
    choice: Any,
    record: Path | None = None,
    *,
    dtype: mx.Dtype = mx.float32,
    bound: float = 1e6,
    dense: Sequence[str] = ("plain",),
) -> KernelSet:
    return choose_kernels(
        choice, SIZES, dtype=dtype, dense=dense, layers=[], expert_input_bound=bound, record=record
    )


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulator poses as a Metal device; the rows above the slot are undefined by design."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "emulator"})
    monkeypatch.setattr(trials, "BATCHES", (1, 5))  # the others cost seconds
    chunk = {"batch": 2, "base": 110, "tokens": 67}
    monkeypatch.setitem(trials.ASKED, "attention_window_prefill", [chunk])
    with emulate(mode="plain", allow=("unwritten-output",)):
        yield


def replaced(stem: str, launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel by another, beside one that is right."""
    changed = {"embed": KERNELS["embed"], stem: replace(KERNELS[stem], launch=launch)}
    monkeypatch.setattr(selection, "KERNELS", changed)


@pytest.mark.usefixtures("metal")
def test_kernels_that_agree_are_used() -> None:
    chosen = choose("on")
    assert not chosen.fallbacks
    assert {stem: getattr(chosen, stem) for stem in KERNELS} == {
        stem: kernel.launch for stem, kernel in KERNELS.items()
    }


@pytest.mark.usefixtures("metal")
def test_a_failing_kernel_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[metal::Device] Unable to build metal library\nprogram_source:2:1: warning: unused\n"
            "simd.h:3:1: error: no such type\n  bfloat x;\nsimd.h:4:1: error: no such name"
        )

    replaced("route", fails, monkeypatch)
    with caplog.at_level(logging.WARNING, "mlx_gptoss"):
        chosen = choose("auto")
    reason = (
        "it failed: [metal::Device] Unable to build metal library simd.h:3:1: error: no such type"
    )
    assert chosen.fallbacks == {"route": reason}
    assert chosen.route is KERNELS["route"].define
    assert chosen.embed is KERNELS["embed"].launch
    assert caplog.messages == [f"kernels that run as plain MLX here: route: {reason}"]
    with pytest.raises(KernelError, match=r'kernels="on": route: it failed.*use "auto"'):
        choose("on")


@pytest.mark.usefixtures("metal")
def test_a_differing_kernel_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    true = KERNELS["out_residual"].launch
    replaced("out_residual", lambda *a, **k: true(*a, **k) * (1 + 1e-5), monkeypatch)
    (reason,) = choose("auto").fallbacks.values()
    assert reason.startswith("it differs by ")
    assert reason.endswith(" times the tolerance")


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("rows", [1, 5])
def test_a_kernel_that_is_wrong_for_some_batches_falls_back(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row alone and rows in blocks are kernels of their own."""
    true = KERNELS["route"].launch

    def wrong(x: mx.array, *args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        y, logits = true(x, *args, **kwargs)
        return y, logits + 1e-3 * (x.shape[0] == rows)

    replaced("route", wrong, monkeypatch)
    assert selection.checked(SIZES, dtype=mx.float32, dense=["plain"], layers=[], record=None)


@pytest.mark.usefixtures("metal")
def test_a_kernel_that_is_wrong_for_one_form_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm packs a router of a model whose other matrices may be plain."""
    true = KERNELS["route"].launch

    def wrong(x: mx.array, norm: mx.array, router: Matrix, *, eps: float) -> Any:
        y, logits = true(x, norm, router, eps=eps)
        return y, logits + 1e-3 * (router.bits == 8)

    replaced("route", wrong, monkeypatch)
    check = partial(selection.checked, SIZES, dtype=mx.float32, layers=[], record=None)
    assert not check(dense=["plain", "q4"])
    assert check(dense=["plain", "q8"])


@pytest.mark.usefixtures("metal")
def test_matrices_that_no_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm packs in 3 or 6 bits, too, and in other groups; attention and experts keep kernels."""
    monkeypatch.setattr(selection, "disagreement", lambda *_, **__: "")
    weight = mx.random.normal((64, 128))
    packed = [
        Matrix(weight=mx.quantize(weight, group_size=group, bits=bits)[0],
               group_size=group, bits=bits, mode="affine")
        for group, bits in ((64, 8), (64, 3), (32, 4))
    ]  # fmt: skip
    forms = [dense_form(matrix) for matrix in packed]
    found = choose("auto", dense=forms).fallbacks
    assert set(found) == DENSE
    assert found["route"] == (
        "it does not read affine weights of 3 bits in groups of 64, "
        "affine weights of 4 bits in groups of 32"
    )
    assert not choose("auto", dense=[forms[0], "plain"]).fallbacks


def test_a_layer_packed_in_two_forms() -> None:
    """The kernel of q, k and v is written for one; each form alone would be read."""
    model = tiny_model(TinyShape(layers=2))
    assert dense_forms(model) == ["plain"]
    attention, moe = model.layers[1]
    packed = dict(
        zip(("weight", "scales", "offsets"), mx.quantize(attention.v.weight), strict=True)
    )
    v = Matrix(**packed, bias=attention.v.bias, group_size=64, bits=4, mode="affine")
    model.layers[1] = replace(attention, v=v), moe
    assert dense_forms(model) == ["plain", "q, k and v packed unlike each other", "q4"]
    assert set(with_all_kernels(model).kernels.fallbacks) == DENSE


def test_definitions_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An M5's GPU gives a definition's float32 products 11 bits."""
    devices, true, kernel = [], mx.stream, KERNELS["attention_reduce"]

    def stream(device: Any) -> Any:
        devices.append(device)
        return true(device)

    monkeypatch.setattr(mx, "stream", stream)
    given = kernel.case(Inputs(SIZES, dtype=mx.float32))
    assert max(compare(replace(kernel, launch=kernel.define), given)) == 0
    assert devices == [mx.cpu]


@pytest.mark.usefixtures("metal")
def test_the_check_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until the kernels, the sizes, MLX or the machine change, or the record is damaged."""
    caplog.set_level(logging.INFO, "mlx_gptoss")
    record = tmp_path / "store" / "kernels.json"
    calls: list[str] = []

    def counted(kernel: registry.Kernel, *_: Any, **__: Any) -> str:
        calls.append(kernel.stem)
        return "it failed: no reason" if kernel.stem == "embed" else ""

    monkeypatch.setattr(selection, "disagreement", counted)
    assert choose("auto", record).fallbacks == {"embed": "it failed: no reason"}
    assert choose("auto", record).fallbacks == {"embed": "it failed: no reason"}
    assert len(calls) == len(KERNELS)
    said = f"Trying {len(KERNELS)} kernels against their definitions, once on this machine."
    assert [record.message for record in caplog.records if record.levelname == "INFO"] == [said]
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "another"})
    choose("auto", record)
    assert len(calls) == 2 * len(KERNELS)
    assert len(json.loads(record.read_text())) == 2
    record.write_text("{")
    choose("auto", record)
    assert len(calls) == 3 * len(KERNELS)


@pytest.mark.usefixtures("metal")
def test_a_failure_on_record_says_how_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been for want of memory, once."""
    record, reasons = tmp_path / "kernels.json", {"embed": "it differs by 9 times the tolerance"}
    monkeypatch.setattr(selection, "checked", lambda *_, **__: dict(reasons))
    choose("auto", record)
    reasons["embed"] = "it failed: [malloc] Unable to allocate 8 bytes."
    choose("auto", record)
    first, second = caplog.messages
    assert str(record) not in first
    assert second.endswith(f"Unable to allocate 8 bytes. (delete {record} to try again)")
    record.write_text("{}")
    with pytest.raises(KernelError, match=r"delete .*kernels.json to try again"):
        choose("on", record)


@pytest.mark.usefixtures("metal")
def test_a_record_that_cannot_be_kept_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selection, "disagreement", lambda *_, **__: "")
    (tmp_path / "file").write_text("")
    assert not choose("auto", tmp_path / "file" / "kernels.json").fallbacks
    assert "cannot keep the outcome of the kernel check" in caplog.text


@pytest.mark.usefixtures("metal")
def test_inputs_that_float16_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm with huge weights: the kernel that keeps its inputs as float16 is not used."""
    monkeypatch.setattr(selection, "disagreement", lambda *_, **__: "")
    assert not choose("auto", dtype=mx.bfloat16, bound=65503).fallbacks
    found = choose("auto", dtype=mx.bfloat16, bound=70000).fallbacks
    reason = "its inputs may reach 70000, which is beyond float16"
    assert found == {"experts_swiglu": reason, "experts_swiglu_grouped": reason}


def test_without_metal() -> None:
    chosen = choose("auto")
    assert set(chosen.fallbacks.values()) == {"this machine has no Metal device"}
    assert chosen.functions == {stem: kernel.define for stem, kernel in KERNELS.items()}
    assert set(choose("off").fallbacks.values()) == {'kernels="off"'}
    with pytest.raises(KernelError, match='kernels="on": this machine has no Metal device; use'):
        choose("on")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no kernel 'attend'"):
        all_definitions("none").attend  # noqa: B018
