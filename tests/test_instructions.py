"""Instructions a lane executes for a block of codes or a key: in the budget, and never growing.

They are counted in PTX built by the ziglang wheel's clang, which needs no GPU and no ptxas.
"""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from benchmarks.instructions import (
    GOLDENS,
    WORK,
    golden_cases,
    measure,
    metal_text,
    one_compiler,
    steady_lines,
)
from mlx_gptoss import metal
from mlx_gptoss.metal.emulator.compiler import find_compiler

RECORD = json.loads(GOLDENS.read_text())
GOLDEN = RECORD["kernels"]
COUNTS = ("ptx", "apple", "once")
BUDGETED = [name for name, row in GOLDEN.items() if row["budget"] is not None]

needs_ziglang = pytest.mark.skipif(
    sys.platform != "linux" or find_spec("ziglang") is None,
    reason="instructions are counted by the clang of the ziglang wheel, on Linux",
)


@pytest.fixture
def compiler() -> Iterator[str]:
    with one_compiler():
        yield find_compiler().version


def test_every_kernel_has_a_golden() -> None:
    assert set(GOLDEN) == set(golden_cases())


@needs_ziglang
@pytest.mark.parametrize("name", golden_cases())
def test_no_count_grows(name: str, compiler: str) -> None:
    """After an intended change: `python benchmarks/instructions.py --write`, and say why it grew.

    Another release of the compiler may write a few instructions more.
    """
    stem, dense, sizes = golden_cases()[name]
    found, golden = vars(measure(stem, sizes, dense=dense)), GOLDEN[name]
    most = 1.0 if compiler == RECORD["compiler"] else 1.05
    grown = {n: (golden[n], found[n]) for n in COUNTS if found[n] > golden[n] * most}
    assert not grown, f"{name}: committed, found: {grown}"


@pytest.mark.parametrize("name", BUDGETED)
def test_budgets_are_kept(name: str) -> None:
    """In the terms they were written in: with Apple's operands, and with idle lanes."""
    assert GOLDEN[name]["apple"] <= GOLDEN[name]["budget"]


def test_kernels_with_a_budget() -> None:
    experts = {"experts_swiglu", "experts_down", "experts_swiglu_grouped", "experts_down_grouped"}
    assert experts | {"attention_decode"} <= set(BUDGETED)


@pytest.mark.parametrize("stem", WORK)
def test_the_steady_state_is_a_part_of_its_file(stem: str) -> None:
    lines = steady_lines(stem, WORK[stem])
    text = metal.source(f"{stem}.metal").splitlines()
    assert WORK[stem].begin in text[lines[0] - 1]
    assert WORK[stem].end in text[lines[-1]]


@needs_ziglang
def test_more_work_is_counted(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplication more for each block is one instruction more; 30 of 32 lanes have a block."""
    stem, dense, sizes = golden_cases()["experts_down"]
    function, text = metal_text(stem, sizes, "bfloat16", dense)
    slower = text.replace("(exponents[i] * scale)", "(exponents[i] * scale * float(lane))")
    assert slower != text
    monkeypatch.setattr("benchmarks.instructions.metal_text", lambda *_: (function, slower))
    found = measure(stem, sizes, dense=dense)
    assert found.apple == pytest.approx(GOLDEN["experts_down"]["apple"] + 32 / 30, abs=0.15)
    assert found.once <= GOLDEN["experts_down"]["once"] + 1
