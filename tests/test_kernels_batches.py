"""Rows of a batch: each has the bits that it has alone, whoever else is there, and where it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_kernels_sources import PUBLISHED, metal_text

from mlx_gptoss.kernels.agreement import flattened
from mlx_gptoss.kernels.batches import groups_experts
from mlx_gptoss.kernels.inputs import Arguments, Dense, Inputs, Sizes
from mlx_gptoss.kernels.matrix import row_blocks
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.metal.emulator import emulate, ptx

ROOT = Path(__file__).resolve().parent.parent
OF_A_ROW = ("x", "control", "append", "residual", "logits", "temperature", "h", "allowed")
SIZES = replace(Sizes(), capacity=320, base=310, vocab=256, slot=0, rows=1)


def rows(arguments: Arguments, chosen: list[int]) -> Arguments:
    """The arguments of some rows of a batch, in another order."""

    def cut(value: Any) -> Any:
        return tuple(map(cut, value)) if isinstance(value, tuple) else value[mx.array(chosen)]

    return {name: cut(v) if name in OF_A_ROW else v for name, v in arguments.items()}


def launched(stem: str, arguments: Arguments) -> list[np.ndarray]:
    """The bits of each output."""
    with emulate(mode="plain"):
        outputs = flattened(KERNELS[stem].launch(**arguments))
    return [np.array(o.view(mx.uint16 if o.itemsize == 2 else mx.uint32)) for o in outputs]


@pytest.mark.parametrize(
    ("stem", "dtype", "dense"),
    [
        ("norm_qkv_rope", mx.bfloat16, "q8"),
        ("out_residual", mx.bfloat16, "plain"),
        ("out_residual", mx.bfloat16, "q4"),
        ("route", mx.bfloat16, "plain"),
        ("unembed", mx.float16, "q8"),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(stem: str, dtype: mx.Dtype, dense: Dense) -> None:
    """Alone, at either end of an odd batch, and in either threadgroup of a larger one."""
    sizes = replace(SIZES, batch=13, hidden=2048)
    given = KERNELS[stem].case(Inputs(sizes, dtype=dtype, dense=dense))
    alone = [launched(stem, rows(given, [b])) for b in (3, 12)]
    for company in ([12, 7, 3], [*range(13)]):
        together = launched(stem, rows(given, company))
        for b, wanted in zip((3, 12), alone, strict=True):
            for got, want in zip(together, wanted, strict=True):
                np.testing.assert_array_equal(got[company.index(b)], want[0])


def test_experts_are_grouped_where_the_card_says() -> None:
    """Between our two forms: see batches.py for MLX's."""
    cards = json.loads((ROOT / "benchmarks" / "results" / "batch_card.json").read_text())
    for model, experts in (("20b", 32), ("120b", 128)):
        for card in cards:
            rows = [r for r in card["rows"] if (r["model"], r["operation"]) == (model, "experts")]
            assert [r["rows"] for r in rows] == [1, 2, 4, 8, 16, 32]
            for row in rows:
                assert groups_experts(row["rows"], experts) == (row["path"] != "rows")


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
def test_threadgroups_fit_the_registers_of_a_core(
    stem: str, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no array in memory: of 8 rows, and of 16, where a simdgroup takes several parts."""
    for batch, simdgroups in ((8, 8 if stem == "out_residual" else 12), (16, 8)):
        sizes = replace(PUBLISHED, batch=batch)
        name, text = metal_text(stem, sizes, "bfloat16", dense, monkeypatch)
        built = ptx.build(text, name)
        assert (built.stack_bytes, built.spill_bytes) == (0, 0)
        assert built.registers is not None
        assert built.registers * 4 * 32 * (3 if stem == "route" else simdgroups) <= 208 * 1024
