"""The mutation suite: every mutant is caught by the check that should, no original is."""

import pytest

from tests.emulator.mutants import MUTANTS
from tests.emulator.mutations import (
    CASES,
    TABLE,
    Mutant,
    caught_by,
    caught_by_strict,
    mutated,
    table,
)


@pytest.mark.parametrize("kernel", CASES)
def test_originals_raise_no_alarm(kernel: str) -> None:
    assert caught_by(kernel, CASES[kernel].source(), {}) == set()
    if "MLX" not in kernel:  # MLX's utility headers copy structs, which the strict check refuses
        assert caught_by_strict(CASES[kernel].source()) == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.kernel}: {m.what}")
def test_mutant_is_caught(mutant: Mutant) -> None:
    found = caught_by(mutant.kernel, mutated(mutant), mutant.launch)
    if mutant.check == "strict":
        assert not found, "the emulator erases address spaces"
        found = caught_by_strict(mutated(mutant))
    assert mutant.check in found, f"caught by {sorted(found) or 'nothing'}"


def test_there_are_enough_and_the_table_is_current() -> None:
    assert len(MUTANTS) >= 40
    assert len({m.kernel for m in MUTANTS}) == 3
    assert TABLE.read_text(encoding="utf-8") == table(MUTANTS), (
        "run `python -m tests.emulator.mutations`"
    )
