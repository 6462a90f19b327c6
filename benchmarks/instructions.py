"""Instructions of the kernels for a unit of their work, built to PTX, beside their budgets.

    python benchmarks/instructions.py            a table, then one line of JSON
    python benchmarks/instructions.py --write    also rewrite tests/goldens/instructions.json

Traffic says what a kernel asks of the memory; this says what it asks of a lane while the memory
delivers. Both are counts, no times, and the instructions are NVIDIA's. Columns:

    ptx     of a lane for one unit, in the steady state: the instructions that come from the lines
            of the kernel's main loop, or of the functions it calls. A lane that has no columns
            counts as work lost: 30 of 32 lanes have some where there are 2880 columns.
    apple   the same less what Apple's instruction set is reported to do by itself, see
            `ptx_code.free_on_apple`. A label, not a measurement.
    budget  lane-instructions a unit: 107 for 32 MXFP4 codes, 1290 for a key and 8 heads, both
            counted by hand before the kernels existed, with Apple's operands in mind. At its
            nominal bandwidth an M1 Max has 225 and 3400.
    once    what a thread executes before and after, a loop's body once
    whole   ptx and a unit's share of `once` at the models' sizes, 256 keys a split

An 8x8 matrix product is one instruction of a simdgroup, and 512 multiply-adds: it counts as the 16
that each lane would do. A branch that a lane may skip counts as taken. Where the unit is a thread,
the whole text is counted, a loop's body once.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.traffic import table  # noqa: E402
from mlx_gptoss import metal  # noqa: E402
from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes  # noqa: E402
from mlx_gptoss.kernels.registry import KERNELS  # noqa: E402
from mlx_gptoss.matrix import Matrix  # noqa: E402
from mlx_gptoss.metal.emulator import emulate, ptx  # noqa: E402
from mlx_gptoss.metal.emulator.compiler import find_compiler  # noqa: E402
from mlx_gptoss.metal.emulator.ptx_code import (  # noqa: E402
    Instruction,
    free_on_apple,
    instructions,
)

GOLDENS = ROOT / "tests" / "goldens" / "instructions.json"
FLOATS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
PUBLISHED = Sizes(  # the 20b; the 120b differs in its experts only
    batch=1, hidden=2880, inter=2880, q_heads=64, kv_heads=8, experts=32, vocab=201088, window=128,
    capacity=256, rows=128, base=200, slot=3, splits=2,
)  # fmt: skip
BATCHED = ("expert_groups", "experts_down_grouped", "experts_sum", "experts_swiglu_grouped")

# What stands for a matrix product: two instructions that no compiler writes by itself.
_PRODUCT = "  simdgroup_multiply_accumulate(C, A, B, C);\n"
_STAND_IN = (
    '  float x, y; asm("fma.rz.f32 %0, %2, %3, %4;\\n\\tfma.rz.f32 %1, %5, %6, %7;" '
    ': "=&f"(x), "=f"(y) : "f"(a.x), "f"(b.x), "f"(c.x), "f"(a.y), "f"(b.y), "f"(c.y)); '
    "return float2(x, y);\n"
)
_SUM, _OF_PRODUCT, _MULTIPLY_ADDS = "fma.rn.f32", "fma.rz.f32", 16
_MULTIPLIED = {"plain": 32, "q8": 36, "q4": 34}  # multiply-adds of 32 weights, scales and offsets


@dataclass(frozen=True, kw_only=True)
class Work:
    """Where the steady state of a kernel is, and how much work it is.

    Attributes:
        unit: of work.
        begin: text in the first line of the steady state, which occurs once.
        end: text in the line after it, the first one below that has it.
        units: of a thread.
        lanes: of 32 that have work.
        budget: lane-instructions a unit, by hand.
    """

    unit: str
    begin: str
    end: str
    units: int
    lanes: int = 32
    budget: int | None = None


def _block(begin: str, end: str, *, units: int) -> Work:
    return Work(unit="32 codes", begin=begin, end=end, units=units, lanes=30, budget=107)


def _key(begin: str, end: str, *, keys: int, budget: int | None = None) -> Work:
    # a thread's share is that of 32 lanes
    return Work(unit="key", begin=begin, end=end, units=keys // 32, budget=budget)


def _weights(begin: str, *, rows: int, lanes: int = 30) -> Work:
    return Work(unit="32 weights", begin=begin, end="threadgroup_barrier", units=rows, lanes=lanes)


WORK = {
    "attention_decode": _key("for (uint t = first + group", "state.end(", keys=256, budget=1290),
    "attention_window": _key("for (uint t = group", "state.end(", keys=32),
    "attention_window_prefill": _key("for (uint start = block", "state.add_totals", keys=160),
    "experts_down": _block("float partial[16]", "threadgroup_barrier", units=16),
    "experts_down_grouped": _block("float2 totals", "const uint vector", units=32),
    "experts_swiglu": _block("for (uint first", "threadgroup_barrier", units=32),
    "experts_swiglu_grouped": _block("for (uint first", "threadgroup_barrier", units=64),
    "norm_qkv_rope": _weights("dot16<32>", rows=16),
    "out_residual": _weights("dot16<8>", rows=16, lanes=32),
    "route": _weights("for (int n = 0; n < 4", rows=4),
    "unembed": _weights("for (uint row = 0; row < 64", rows=64),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The counts of one kernel."""

    unit: str
    ptx: float
    apple: float
    budget: int | None
    once: int
    whole: float


class Shapes(Inputs):
    """Inputs of the right shapes and types, without the numbers."""

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Zeros, which nothing evaluates."""
        return mx.zeros(shape, self.dtype)

    def expert_matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """MXFP4 experts of zeros."""
        shape = (self.sizes.experts, rows)
        return Matrix(
            weight=mx.zeros((*shape, columns // 8), mx.uint32),
            scales=mx.zeros((*shape, columns // 32), mx.uint8),
            bias=mx.zeros(shape, self.dtype),
            group_size=32,
            bits=4,
            mode="mxfp4",
        )


def metal_text(stem: str, sizes: Sizes, dtype: str, dense: Dense) -> tuple[str, str]:
    """The name and the whole Metal source that MLX generates for one call of a kernel."""
    kernel = KERNELS[stem]
    with emulate(threadgroups=0) as session:
        kernel.launch(**kernel.case(Shapes(sizes, dtype=FLOATS[dtype], dense=dense)))
    return session.sources.popitem()


def without_products(text: str) -> str:
    """The source with a stand-in for the matrix product, which other GPUs do not have."""
    assert text.count(_PRODUCT) == ("Attention" in text)
    return text.replace(_PRODUCT, _STAND_IN)


def steady_lines(stem: str, work: Work) -> range:
    """Lines of the kernel's file that its steady state is written in, its calls included."""
    lines = metal.source(f"{stem}.metal").splitlines()
    (begin,) = (n for n, line in enumerate(lines, 1) if work.begin in line)
    return range(begin, next(n for n in range(begin, len(lines)) if work.end in lines[n]) + 1)


def steady_state(code: list[Instruction], file: str, lines: range) -> list[int]:
    """Indices of the instructions of these lines, in the loop of the sums if the compiler left one.

    One that was joined from several lines goes with the instruction before it.
    """
    found, inside = [], False
    for at, one in enumerate(code):
        own = [line for name, line in one.places if name == file]
        if own and own[-1] > 0:
            inside = own[-1] in lines
        if inside:
            found.append(at)
    loops = max(code[at].depth for at in found if code[at].opcode in (_SUM, _OF_PRODUCT))
    return [at for at in found if code[at].depth >= loops]


def measure(stem: str, sizes: Sizes, *, dense: Dense) -> Row:
    """Build one kernel for bfloat16 activations and count."""
    name, text = metal_text(stem, sizes, "bfloat16", dense)
    code = instructions(ptx.emit(without_products(text), name))
    free = free_on_apple(code)
    work = WORK.get(stem)
    if work is None:
        return Row(unit="thread", ptx=len(code), apple=len(code) - len(free),
                   budget=None, once=0, whole=len(code))  # fmt: skip
    lines = steady_lines(stem, work)
    steady = steady_state(code, f"{stem}.metal", lines)
    products = sum(code[at].opcode == _OF_PRODUCT for at in steady) / 2
    sums = sum(code[at].opcode == _SUM for at in steady)
    # units of the text, whatever was unrolled; 64 products are those of 32 keys, by 32 lanes
    units = products / 64 if work.unit == "key" else sums / _MULTIPLIED[dense]
    assert units > 0 and units % 1 == 0, f"{stem}: {units} units of {work.unit} in its steady state"
    share = 32 / work.lanes / units
    count = len(steady) + products * (_MULTIPLY_ADDS - 2)
    once = len(code) - len(steady)
    return Row(
        unit=work.unit,
        ptx=round(count * share, 1),
        apple=round((count - len(free.intersection(steady))) * share, 1),
        budget=work.budget,
        once=once,
        whole=round(count * share + once * 32 / work.lanes / work.units, 1),
    )


def golden_cases() -> dict[str, tuple[str, Dense, Sizes]]:
    """Every kernel of the 20b, dense ones in each format, and what the 120b changes."""
    formats: tuple[Dense, ...] = ("plain", "q8", "q4")
    found: dict[str, tuple[str, Dense, Sizes]] = {}
    for stem, kernel in KERNELS.items():
        sizes = replace(PUBLISHED, batch=8 if stem in BATCHED else 1)
        for dense in formats if kernel.dense and not stem.startswith("route") else formats[:1]:
            found[f"{stem} {dense}" if kernel.dense else stem] = stem, dense, sizes
    for stem in ("experts_swiglu", "experts_down"):
        found[f"{stem} 120b"] = stem, "plain", replace(PUBLISHED, experts=128)
    return found


@contextmanager
def one_compiler() -> Iterator[None]:
    """The clang of the ziglang wheel, wherever this runs: another may count otherwise."""
    before = os.environ.get("MSL_CXX")
    os.environ["MSL_CXX"] = "ziglang"
    try:
        yield
    finally:
        os.environ.pop("MSL_CXX")
        if before is not None:
            os.environ["MSL_CXX"] = before


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the golden of the tests")
    write = parser.parse_args().write
    with one_compiler():
        rows = {
            name: measure(stem, sizes, dense=dense)
            for name, (stem, dense, sizes) in golden_cases().items()
        }
        record = {
            "compiler": find_compiler().version,
            "kernels": {name: asdict(row) for name, row in rows.items()},
        }
    if write:
        GOLDENS.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
