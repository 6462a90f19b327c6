"""Rows of a batch: each has the bits that it has alone, whoever else is there, and where it is."""

import itertools
import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.instructions import PUBLISHED, metal_text
from mlx_gptoss.engine import MOST_AT_ONCE
from mlx_gptoss.kernels.agreement import flattened
from mlx_gptoss.kernels.batches import EXACT_ROWS, GROUPED_FROM, MLX_FROM, experts_form, takes_mlx
from mlx_gptoss.kernels.grouped import GROUPED, SINGLE
from mlx_gptoss.kernels.inputs import Arguments, Dense, Inputs, Sizes
from mlx_gptoss.kernels.matrix import row_blocks
from mlx_gptoss.kernels.products import PRODUCTS
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet, all_definitions
from mlx_gptoss.metal.emulator import emulate, ptx

ROOT = Path(__file__).resolve().parent.parent
OF_A_ROW = ("x", "control", "append", "residual", "logits", "temperature", "h", "allowed")
SIZES = replace(Sizes(), capacity=320, base=310, vocab=256, slot=0, rows=1)


def rows(arguments: Arguments, chosen: list[int]) -> Arguments:
    """The arguments of some rows of a batch, in another order."""

    def cut(value: Any) -> Any:
        return tuple(map(cut, value)) if isinstance(value, tuple) else value[mx.array(chosen)]

    return {name: cut(v) if name in OF_A_ROW else v for name, v in arguments.items()}


def widened(value: Any) -> Any:
    """Arrays as float32."""
    return tuple(map(widened, value)) if isinstance(value, tuple) else value.astype(mx.float32)


def launched(stem: str, arguments: Arguments) -> list[np.ndarray]:
    """The bits of each output."""
    with emulate(mode="plain"):
        outputs = flattened(KERNELS[stem].launch(**arguments))
    return [np.array(o.view(mx.uint16 if o.itemsize == 2 else mx.uint32)) for o in outputs]


# The published columns, and few rows of weights: no threadgroup knows of the others.
WIDTHS = {
    "norm_qkv_rope": {"hidden": 2880, "q_heads": 2, "kv_heads": 1},
    "out_residual": {"hidden": 32, "q_heads": 64},
    "route": {"hidden": 2880, "experts": 8},
    "unembed": {"hidden": 2880},
}


@pytest.mark.parametrize(
    ("stem", "dense"),
    [(s, d) for s in WIDTHS for d in get_args(Dense) if s != "route" or d == "plain"],
)
def test_rows_together_have_the_bits_they_have_alone(stem: str, dense: Dense) -> None:
    """Of every number of rows up to 8, and of the most that keep their bits.

    The weights are bfloat16, what they multiply is not: its rounding would hide another order.
    """
    sizes = replace(SIZES, batch=EXACT_ROWS, **WIDTHS[stem])
    given = KERNELS[stem].case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    given |= {n: widened(given[n]) for n in ("x", "residual", "append") if n in given}
    alone = [launched(stem, rows(given, [b])) for b in range(EXACT_ROWS)]
    for company in (*range(2, 9), EXACT_ROWS):
        together = launched(stem, rows(given, [*range(company)]))
        for b in range(company):
            for got, want in zip(together, alone[b], strict=True):
                np.testing.assert_array_equal(got[b], want[0], err_msg=f"row {b} of {company}")


@pytest.mark.parametrize(
    ("stem", "dtype", "dense"),
    [("norm_qkv_rope", mx.float32, "plain"), ("unembed", mx.float16, "q8")],
)
def test_a_row_has_the_same_bits_in_any_company(stem: str, dtype: mx.Dtype, dense: Dense) -> None:
    """Alone, at either end of an odd batch, and in either threadgroup of a larger one."""
    sizes = replace(SIZES, batch=19, hidden=2048)
    given = KERNELS[stem].case(Inputs(sizes, dtype=dtype, dense=dense))
    alone = [launched(stem, rows(given, [b])) for b in (3, 18)]
    for company in ([18, 7, 3], [*range(19)]):
        together = launched(stem, rows(given, company))
        for b, wanted in zip((3, 18), alone, strict=True):
            for got, want in zip(together, wanted, strict=True):
                np.testing.assert_array_equal(got[company.index(b)], want[0])


def card() -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / "batch_card.json").read_text())["rows"]


def crossover(lines: list[dict[str, Any]], forms: set[str]) -> int | None:
    """The fewest rows from which on one of these forms is the fastest."""
    others = [line["rows"] for line in lines if line["fastest"] not in forms]
    rows = [line["rows"] for line in lines if line["rows"] > max(others, default=0)]
    return min(rows, default=None)


def test_the_tables_are_the_cards() -> None:
    """Every crossover in the committed card, and no other, is in batches.py."""
    experts_of = {"20b": 32, "120b": 128}
    found: dict[str, dict[str | int, int]] = {operation: {} for operation in MLX_FROM}
    lines: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for line in card():
        kind = experts_of.get(line["model"], line["packing"])
        lines[line["operation"], kind].append(line)
    assert {len(one) for one in lines.values()} == {16}
    for (operation, kind), one in lines.items():
        first = crossover(one, {"mlx"})
        if first is not None:
            found[operation][kind] = first
    assert found == MLX_FROM
    for experts, first in GROUPED_FROM.items():
        assert crossover(lines["experts", experts], {"grouped", "mlx"}) == first


def test_bits_that_do_not_depend_on_company_cost_little() -> None:
    """Up to 16 rows our kernels are slower than the best choice by less than 3% of a layer."""
    assert EXACT_ROWS == MOST_AT_ONCE
    layers: dict[Any, list[dict[str, float]]] = defaultdict(list)
    for line in card():
        for model, packing in itertools.product(("20b", "120b"), get_args(Dense)):
            shared = line["model"] == "both" and line["packing"] == packing
            in_layer = (shared or line["model"] == model) and line["operation"] != "unembed"
            if in_layer and line["rows"] <= EXACT_ROWS:
                layers[model, packing, line["rows"]].append(line["predicted_us"])
    assert len(layers) == 2 * 3 * 11
    for layer, times in layers.items():
        best = sum(min(us.values()) for us in times)
        ours = sum(min(us[form] for form in us if form != "mlx") for us in times)
        assert len(times) == 4
        assert ours < 1.03 * best, layer


def test_forms_of_every_number_of_experts() -> None:
    """A model of other sizes than the published goes by the next larger, or the largest."""
    assert [experts_form(experts, 3) for experts in (8, 32, 33, 128, 200)] == [
        "grouped", "grouped", "rows", "rows", "rows",
    ]  # fmt: skip
    assert [experts_form(experts, 32) for experts in (8, 32, 33, 200)] == [
        "mlx", "mlx", "grouped", "grouped",
    ]  # fmt: skip
    assert not takes_mlx("out_residual", "q8", EXACT_ROWS)
    assert takes_mlx("out_residual", "q8", EXACT_ROWS + 1)
    assert not takes_mlx("norm_qkv_rope", "q4", 32)
    assert not takes_mlx("unembed", "affine weights of 6 bits in groups of 64", 32)
    assert takes_mlx("route", 200, 17)


@pytest.mark.parametrize("dense", get_args(Dense))
@pytest.mark.parametrize("stem", PRODUCTS)
def test_products_mean_what_kernels_mean(stem: str, dense: Dense) -> None:
    """Of 20 rows; to bfloat16's precision, in which a product ends."""
    kernel, kernels = KERNELS[stem], all_definitions("MLX's operations are compared")
    sizes = replace(Sizes(), batch=20, hidden=320)
    given = kernel.case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    got, want = (
        kernel.observe(flattened(outputs), given)
        for outputs in (PRODUCTS[stem](**given, kernels=kernels), kernel.define(**given))
    )
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if stem != "unembed" or a is got[0]:  # candidates are of these logits: another may win
            a, b = (mx.nan_to_num(x.astype(mx.float32)) for x in (a, b))
            assert mx.abs(a - b).max() <= 2e-2 * mx.abs(b).max()


@pytest.mark.parametrize("stem", [*SINGLE, *GROUPED])
def test_experts_are_grouped_only_where_single_rows_run_kernels(stem: str) -> None:
    """Else a row would have one form's bits alone and the other's in a batch."""
    assert KernelSet.of({}).groups_experts
    assert KernelSet.of({"route": "of no concern"}).groups_experts
    assert not KernelSet.of({stem: "it differs"}).groups_experts


def logits(kind: str, count: int) -> mx.array:
    """Of rows that choose at random, all the same experts, or in part the last one."""
    random = mx.array(np.random.default_rng(3).standard_normal((count, 20), dtype=np.float32))
    ids = mx.arange(20, dtype=mx.float32)
    some_last = mx.where((ids == 19) & (mx.arange(count)[:, None] % 2 == 0), 9, random)
    return {"random": random, "one": ids + 0 * random, "last": some_last}[kind]


@pytest.mark.parametrize(
    ("kind", "batch", "dtype"),
    [
        ("random", 2, mx.float16),
        ("random", 33, mx.bfloat16),
        ("one", 7, mx.bfloat16),
        ("last", 7, mx.float32),
    ],
)
def test_grouped_experts_have_the_bits_of_single_rows(
    kind: str, batch: int, dtype: mx.Dtype
) -> None:
    """With experts of 0, 1, 4, 5 and all rows, the last expert, and more simdgroups than one."""
    sizes = replace(SIZES, batch=batch, hidden=2048, inter=1280)
    single, down = (
        KERNELS[stem].case(Inputs(replace(sizes, **cut), dtype=dtype))
        | {"logits": logits(kind, batch)}
        for stem, cut in (("experts_swiglu", {"inter": 32}), ("experts_down", {"hidden": 64}))
    )
    rest = {name: single[name] for name in ("chosen", "alpha", "limit")}
    with emulate(mode="plain"):
        k = {stem: kernel.launch for stem, kernel in KERNELS.items()}
        blocks, choice = k["expert_groups"](single["logits"], chosen=4)
        h = k["experts_swiglu_grouped"](single["x"], blocks, single["gate"], single["up"], **rest)
        sums = k["experts_down_grouped"](down["h"], blocks, choice, down["down"])
        y = k["experts_sum"](sums, choice, down["down"].bias, down["residual"])
        assert mx.array_equal(h, k["experts_swiglu"](**single))
        assert mx.array_equal(y, k["experts_down"](**down))
    assert int(blocks[:, 1].sum()) == 4 * batch


@pytest.mark.parametrize(("columns", "parts"), [(96, 1), (2880, 3), (4096, 4)])
def test_blocks_cover_every_batch(columns: int, parts: int) -> None:
    """Whole, with no empty threadgroup, the weights read once by 16 rows, at most 12 simdgroups."""
    for batch in range(1, 40):
        cut = row_blocks(batch, columns)
        assert (cut.groups - 1) * cut.vectors < batch <= cut.groups * cut.vectors
        assert cut.simdgroups * cut.parts == cut.blocks * parts
        assert cut.simdgroups <= 12
        assert cut.groups == -(-batch // 16)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas: registers cannot be counted")
@pytest.mark.parametrize("dense", ["plain", "q8", "q4"])
@pytest.mark.parametrize("stem", ["norm_qkv_rope", "out_residual", "route", "unembed"])
def test_threadgroups_fit_the_registers_of_a_core(stem: str, dense: Dense) -> None:
    """With no array in memory: of 8 rows, and of 16, where a simdgroup takes several parts."""
    for batch, simdgroups in ((8, 8 if stem == "out_residual" else 12), (16, 8)):
        sizes = replace(PUBLISHED, batch=batch)
        name, text = metal_text(stem, sizes, "bfloat16", dense)
        built = ptx.build(text, name)
        assert (built.stack_bytes, built.spill_bytes) == (0, 0)
        assert built.registers is not None
        assert built.registers * 4 * 32 * (3 if stem == "route" else simdgroups) <= 208 * 1024
