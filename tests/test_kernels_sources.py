"""What a kernel must have to exist: a header, a row in the table, clean address spaces, registers.

And the checks in front of each kernel: every message names the kernel, the input, what was expected
and what was given.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.instructions import PUBLISHED, metal_text, without_products
from mlx_gptoss.errors import KernelError
from mlx_gptoss.kernels import prompt_cases
from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.batches import EXACT_ROWS
from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.trials import trials
from mlx_gptoss.metal.emulator import check_strict, ptx

METAL = Path(__file__).resolve().parent.parent / "metal"
FIELDS = (
    "Inputs:",
    "Output:",
    "Grid:",
    "Numerics:",
    "Requires:",
    "Used when:",
    "Not fused:",
    "Source:",
)
STORED: list[tuple[str, Dense]] = [
    ("float32", "plain"),
    ("bfloat16", "plain"),
    ("float16", "q8"),
    ("bfloat16", "q4"),
]
FORMS = [
    (stem, dtype, dense)
    for stem, kernel in KERNELS.items()
    for dtype, dense in STORED
    if kernel.dense or dense == "plain"
]


def test_registry_is_the_folder_and_the_table() -> None:
    stems = {path.stem for path in METAL.glob("*.metal")}
    table = re.findall(r"^\| `(\w+)` \|", (METAL / "README.md").read_text(), re.M)
    assert stems == set(KERNELS) == set(table)
    assert len(table) == len(stems)


@pytest.mark.parametrize("stem", KERNELS)
def test_header_has_every_field(stem: str) -> None:
    header = re.match(r"(//.*\n)+", (METAL / f"{stem}.metal").read_text())
    assert header
    assert header[0].startswith(f"// {stem}: ")
    missing = [name for name in FIELDS if f"\n// {name}" not in header[0]]
    assert not missing


# What has fewer than 8 elements with few rows or tokens: MLX passes it as `constant`.
CONSTANTS = {
    "attention_window_prefill": {"first"},
    "embed": {"token"},
    "expert_dispatch": {"experts"},
    "extend_ring": {"offset"},
    "sum_pairs": {"experts", "inverse", "shares"},
    "swiglu_pairs": {"experts"},
}
SCALARS = {"offset"}  # of one element, however many rows there are


@pytest.mark.parametrize(("stem", "dtype", "dense"), FORMS)
def test_address_spaces(stem: str, dtype: str, dense: Dense) -> None:
    """With one row and one token, and with nine where that changes an address space."""
    constants = CONSTANTS.get(stem, set())
    for rows, expected in ((1, constants), (9, constants & SCALARS)):
        sizes = replace(Sizes(), batch=rows, tokens=rows)
        name, text = metal_text(stem, sizes, dtype, dense)
        signature = text[text.index("[[kernel]]") :]
        found = re.findall(r"const constant \w+\* (\w+) \[\[buffer", signature)
        assert {name for name in found if not name.endswith("_shape")} == expected
        if rows == 1 or constants - SCALARS:
            check_strict(text, name)


OF_PROMPTS = {stem for stem in KERNELS if hasattr(prompt_cases, stem)}
OF_PAIRS = {"expert_dispatch", "sum_pairs", "swiglu_pairs"}  # from `moe.GROUP_FROM` pairs on


@pytest.mark.parametrize("stem", KERNELS)
def test_what_a_model_launches_was_tried(stem: str) -> None:
    """No number of turns, tokens or positions makes a source that the first-use check never ran."""

    def source(sizes: Sizes) -> str:
        return metal_text(stem, sizes, "bfloat16", "plain")[1]

    asked: list[dict[str, int]] = [{"batch": batch} for batch in range(1, EXACT_ROWS + 1)]
    if stem in OF_PROMPTS:
        asked = [
            {"batch": batch, "tokens": tokens}
            for batch in (1, 2, 7, 8, 9)
            for tokens in (1, 2, 4, 5, 7, 16, 130, 512)
            if tokens >= 16 or stem not in OF_PAIRS
        ]
    asked += [{"capacity": capacity, "splits": splits_for(capacity)} for capacity in (512, 131072)]
    tried = {source(sizes) for sizes in trials(stem, PUBLISHED)}
    unlike = [one for one in asked if source(replace(PUBLISHED, **one)) not in tried]
    assert not unlike


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas: registers cannot be counted")
@pytest.mark.parametrize(
    ("stem", "dtype", "dense"), [form for form in FORMS if form[1] != "float32"]
)
def test_arrays_stay_in_registers(stem: str, dtype: str, dense: Dense) -> None:
    """Built for another GPU, no thread needs memory of its own; 128 registers are enough.

    An 8x8 matrix product is one instruction on Apple's GPUs. Here it would be 32 shuffles, whose
    registers are not the kernel's: two multiply-adds of the same operands stand in for it.
    """
    name, text = metal_text(stem, PUBLISHED, dtype, dense)
    built = ptx.build(without_products(text), name)
    assert (built.stack_bytes, built.spill_bytes) == (0, 0)
    assert built.registers is not None
    # of all 32 experts; our conversions never quantise a router, other people's may
    assert built.registers <= (136 if (stem, dense) == ("route_prefill", "q8") else 128)


def change(stem: str, **changes: Any) -> None:
    """Call a kernel with some arguments of its case replaced; nothing is launched."""
    kernel = KERNELS[stem]
    given = kernel.case(Inputs(replace(Sizes(), batch=1), dtype=mx.float32))
    kernel.launch(**given | changes)


@pytest.mark.parametrize(
    ("stem", "changes", "message"),
    [
        ("attention_decode", {"q": mx.zeros((1, 14, 64))},
         "query heads: expected a multiple of 5, at most 8 for each KV head, got 14"),
        ("attention_decode", {"control": mx.zeros((1, 4), mx.int32)},
         r"control: expected \(1, 8\) int32, got \(1, 4\) int32"),
        ("attention_decode", {"splits": 0}, "splits: expected at least 1, got 0"),
        ("attention_decode", {"frozen": (mx.zeros((1, 5, 0, 64)),) * 2},
         "frozen rows: expected at least 1, got 0"),
        ("attention_reduce", {"sinks": mx.zeros((15,), mx.int32)},
         r"sinks: expected \(15,\) float32 or float16 or bfloat16, got \(15,\) int32"),
        ("attention_window", {"ring": (mx.zeros((1, 5, 70, 64)),) * 2},
         "window: expected a multiple of 32, got 70"),
        ("attention_window", {"append": (mx.zeros((1, 5, 48, 64), mx.float16),) * 2},
         r"append keys: expected \(1, 5, 48, 64\) float32, got \(1, 5, 48, 64\) float16"),
        ("attention_window_prefill", {"keys": mx.zeros((1, 5, 167, 64)),
                                      "values": mx.zeros((1, 5, 167, 64))},
         "keys: expected T and a multiple of 32 before, got 167"),
        ("attention_window_prefill", {"values": mx.zeros((1, 5, 163, 64), mx.float16)},
         r"values: expected \(1, 5, 163, 64\) float32, got \(1, 5, 163, 64\) float16"),
        ("attention_window_prefill", {"q": mx.zeros((1, 45, 67, 64)), "sinks": mx.zeros((45,))},
         "query heads: expected a multiple of 5, at most 8 for each KV head, got 45"),
        ("embed", {"width": 100},
         "table columns: expected a multiple of 32 that fills whole simdgroups, got 100"),
        ("expert_dispatch", {"experts": mx.zeros((6,), mx.uint32)},
         r"experts: expected \(N, K\), got \(6,\)"),
        ("expert_dispatch", {"experts": mx.zeros((6, 4), mx.int32)},
         r"experts: expected \(6, 4\) uint32, got \(6, 4\) int32"),
        ("expert_dispatch", {"count": 0}, "count: expected at least 1, got 0"),
        ("experts_down", {"residual": mx.zeros((1, 190))},
         r"residual: expected \(1, 192\) float32, got \(1, 190\) float32"),
        ("expert_groups", {"chosen": 21}, "chosen: expected 1 to 20, got 21"),
        ("expert_groups", {"logits": mx.zeros((1, 64)), "chosen": 33},
         "pairs: expected at most 32, got 33"),
        ("experts_down_grouped", {"blocks": mx.zeros((5, 8), mx.int32)},
         r"blocks: expected \(4, 8\) int32, got \(5, 8\) int32"),
        ("experts_sum", {"choice": mx.zeros((1, 3, 2))},
         r"choice: expected \(1, 4, 2\) float32, got \(1, 3, 2\) float32"),
        ("experts_swiglu_grouped", {"chosen": 5},
         r"blocks: expected \(5, 8\) int32, got \(4, 8\) int32"),
        ("experts_swiglu", {"chosen": 21}, "chosen: expected 1 to 20, got 21"),
        ("extend_ring", {"new": (mx.zeros((1, 5, 67, 32)),) * 2},
         r"new keys: expected \(1, 5, 67, 64\) float32, got \(1, 5, 67, 32\) float32"),
        ("qkv_rope", {"products": tuple(mx.zeros((1, 3, 64 * n)) for n in (15, 5, 5))},
         r"cosines: expected \(1, 1, 3, 32\) float32, got \(1, 1, 67, 32\) float32"),
        ("qkv_rope", {"products": (mx.zeros((1, 68, 960)), *[mx.zeros((1, 67, 320))] * 2)},
         "queries: expected at most 67, got 68"),
        ("qkv_rope", {"products": [mx.zeros((1, 67, 960)), *[mx.zeros((1, 67, 300))] * 2]},
         "k columns: expected whole heads of 64, got 300"),
        ("rms_norm", {"x": mx.zeros((2, 192), mx.bfloat16)},
         "weight: expected no wider than mlx.core.bfloat16, got mlx.core.float32"),
        ("rms_norm", {"weight": mx.zeros((191,))}, r"weight: expected \(192,\) float32"),
        ("route_prefill", {"chosen": 21}, "chosen: expected 1 to 20, got 21"),
        ("sum_pairs", {"inverse": mx.zeros((4,), mx.uint32)},
         r"inverse: expected \(268,\) uint32, got \(4,\) uint32"),
        ("swiglu_pairs", {"experts": mx.zeros((268,), mx.int32)},
         r"experts: expected \(268,\) uint32, got \(268,\) int32"),
        ("swiglu_pairs", {"products": (mx.zeros((268, 1, 8200)),) * 2,
                          "biases": (mx.zeros((20, 8200)),) * 2},
         "columns: expected a multiple of 8, at most 8192, got 8200"),
        ("norm_qkv_rope", {"append": (mx.zeros((1, 5, 48, 32)),) * 2},
         r"append keys: expected \(1, 5, 48, 64\) float32, got \(1, 5, 48, 32\) float32"),
        ("out_residual", {"residual": mx.zeros((1, 100))},
         "rows: expected a multiple of 16, got 100"),
        ("route", {"norm": mx.zeros((191,))}, r"norm: expected \(192,\) float32"),
        ("sample_filtered", {"sampling": mx.zeros((1, 4))},
         r"sampling: expected \(1, 8\) float32, got \(1, 4\) float32"),
        ("sample_token", {"best": mx.zeros((1, 10, 4))}, r"best: expected \(1, 11, 4\) float32"),
        ("unembed", {"allowed": mx.zeros((22,), mx.uint32)},
         r"allowed: expected \(1, 22\) uint32, got \(22,\) uint32"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(stem: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=f'^{stem}: {message}.*load the model with kernels="off"'):
        change(stem, **changes)


EXPERTS = ["experts_swiglu", "experts_down", "experts_swiglu_grouped", "experts_down_grouped"]


@pytest.mark.parametrize("stem", EXPERTS)
def test_experts_are_mxfp4(stem: str) -> None:
    given = KERNELS[stem].case(Inputs(Sizes(), dtype=mx.float32))
    name = "gate" if "swiglu" in stem else "down"
    affine = replace(given[name], mode="affine")
    with pytest.raises(KernelError, match=f"{stem}: {name}: expected mxfp4 weights, got affine"):
        KERNELS[stem].launch(**given | {name: affine})


def test_dense_matrices_have_4_or_8_bits() -> None:
    given = KERNELS["embed"].case(Inputs(Sizes(), dtype=mx.float32, dense="q8"))
    with pytest.raises(KernelError, match="embed: table bits: expected 4 or 8, got 3"):
        KERNELS["embed"].launch(**given | {"matrix": replace(given["matrix"], bits=3)})
