"""One-line mutants of three kernels, and the check that must catch each.

`python -m tests.emulator.mutations` writes the table of metal/emulator/MUTATIONS.md anew.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import (
    Buffer,
    CompileError,
    Kernel,
    KernelFault,
    check_strict,
    read_metal,
)
from tests.emulator.mlx_kernels import source as mlx_source

TABLE = Path(__file__).parents[2] / "metal" / "emulator" / "MUTATIONS.md"
FOLDER = Path(__file__).parent / "metal"


@dataclass(frozen=True)
class Case:
    """A kernel with inputs and the result it should have."""

    function: str
    source: Callable[[], str]
    buffers: Callable[[], dict[str, Buffer]]
    wanted: Callable[[], dict[str, np.ndarray]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


@dataclass(frozen=True)
class Mutant:
    """A change of the source, or of the launch, and the name of the check that catches it.

    Besides the emulator's checks: `values` the result is wrong; `strict` the address-space check;
    `compile` it does not compile; `buffer` a buffer does not fit its parameter.
    """

    kernel: str
    what: str
    check: str
    old: str = ""
    new: str = ""
    launch: dict = field(default_factory=dict)


# ---- mxfp4_rows
ROWS, COLUMNS = 22, 1312
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@functools.cache
def _matrix() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8)
    scales = rng.integers(120, 125, (ROWS, COLUMNS // 32), dtype=np.uint8)
    x, bias = (rng.standard_normal(n).astype(np.float32) for n in (COLUMNS, ROWS))
    return packed, scales, x, bias


def _mxfp4_buffers() -> dict[str, Buffer]:
    packed, scales, x, bias = _matrix()
    sizes = {"rows": ROWS, "columns": COLUMNS}
    arrays = {"w": packed.view(np.uint32), "scales": scales, "x": x, "bias": bias}
    buffers = {n: Buffer.of(a) for n, a in arrays.items()}
    buffers |= {n: Buffer.of(np.uint32(v)) for n, v in sizes.items()}
    return buffers | {"y": Buffer.empty((ROWS,), "float32")}


def _mxfp4_wanted() -> dict[str, np.ndarray]:
    packed, scales, x, bias = _matrix()
    codes = np.stack([FP4[packed & 15], FP4[packed >> 4]], -1).reshape(ROWS, COLUMNS)
    z = (codes * np.repeat(np.exp2(scales.astype(float) - 127), 32, -1)) @ x + bias
    groups = [z[i : i + 4] for i in range(0, ROWS, 4)]
    return {"y": np.concatenate([g - np.log(np.exp(g - g.max()).sum()) - g.max() for g in groups])}


# ---- scan
LENGTH = 768


@functools.cache
def _numbers() -> np.ndarray:
    return np.random.default_rng(2).integers(1, 50, LENGTH).astype(np.uint32)


def _scan_buffers() -> dict[str, Buffer]:
    outputs = {n: Buffer.empty((LENGTH,), "uint32") for n in ("sums", "back", "steps")}
    total = Buffer.of(np.zeros(1, np.uint32), dtype="")
    return {"x": Buffer.of(_numbers()), "total": total} | outputs


def _scan_wanted() -> dict[str, np.ndarray]:
    x = _numbers().reshape(-1, 256)
    sums = x.cumsum(1)
    total = np.frombuffer(np.uint32(x.sum()).tobytes(), np.uint8)
    return {"sums": sums.ravel(), "back": sums[:, ::-1].ravel(), "steps": x.ravel(), "total": total}


# ---- softmax_looped of MLX
WIDTH = 4500


@functools.cache
def _logits() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, WIDTH)).astype(np.float32) * 3


def _softmax_buffers() -> dict[str, Buffer]:
    width = Buffer.of(np.int32(WIDTH))
    return {
        "in": Buffer.of(_logits()),
        "out": Buffer.empty((2, WIDTH), "float32"),
        "axis_size": width,
    }


def _softmax_wanted() -> dict[str, np.ndarray]:
    x = _logits().astype(float)
    e = np.exp(x - x.max(1, keepdims=True))
    return {"out": e / e.sum(1, keepdims=True)}


def _softmax_source() -> str:
    """Without the other kernel of the file, whose template heading is the same."""
    text = mlx_source("softmax.h")
    return text[: text.index("softmax_single_row")] + text[text.index("softmax_looped") :]


CASES = {
    "mxfp4_rows": Case(
        "mxfp4_rows", lambda: read_metal(FOLDER / "mxfp4_rows.metal"), _mxfp4_buffers,
        _mxfp4_wanted, (6 * 128, 1, 1), (128, 1, 1),
    ),
    "scan": Case(
        "scan", lambda: read_metal(FOLDER / "scan.metal"), _scan_buffers, _scan_wanted,
        (LENGTH, 1, 1), (256, 1, 1),
    ),
    "softmax_looped (MLX)": Case(
        "softmax_looped<float, float>", _softmax_source, _softmax_buffers, _softmax_wanted,
        (2 * 1024, 1, 1), (1024, 1, 1),
    ),
}  # fmt: skip


def mutated(mutant: Mutant) -> str:
    """The mutant's source; the first place that matches is changed, and one must."""
    source = CASES[mutant.kernel].source()
    assert mutant.old in source, f"{mutant.what}: {mutant.old!r} is not in {mutant.kernel}"
    return source.replace(mutant.old, mutant.new, 1)


def caught_by(kernel: str, source: str, launch: dict) -> set[str]:
    """Run a kernel in both orders and name everything that objects to it; empty if nothing does."""
    case = CASES[kernel]
    launch = dict(launch)
    found: set[str] = set()
    try:
        made = Kernel(source, case.function)
    except CompileError:
        return {"compile"}
    more = launch.pop("buffers", {})
    size = {"grid": case.grid, "threadgroup": case.threadgroup} | launch
    for order in ("forward", "reverse"):
        buffers = case.buffers() | more
        try:
            made(buffers, order=order, **size)
        except KernelFault as fault:
            found |= {f.check for f in fault.report.findings}
        except EmulatorError:
            return {"buffer"}
        if not _right(buffers, case.wanted()):
            found.add("values")
    return found


def caught_by_strict(source: str) -> set[str]:
    """Compile a kernel with real address spaces."""
    try:
        check_strict(source)
    except CompileError:
        return {"strict"}
    return set()


def _right(buffers: dict[str, Buffer], wanted: dict[str, np.ndarray]) -> bool:
    for name, array in wanted.items():
        got = buffers[name].array().astype(float).reshape(array.shape)
        scale = np.abs(array).max()
        if not (np.abs(got - array) <= 2e-6 * scale).all():
            return False
    return True


def table(mutants: list[Mutant]) -> str:
    """The Markdown of MUTATIONS.md."""
    lines = [
        "# Mutants and what catches them",
        "",
        f"{len(mutants)} one-line mutants of {len(CASES)} kernels. The test suite runs each in",
        "both orders and fails unless the check named here catches it; the unchanged kernels pass",
        "every check. Written by `python -m tests.emulator.mutations`.",
        "",
        "| kernel | mutant | change | caught by |",
        "| --- | --- | --- | --- |",
    ]
    for m in mutants:
        old, new = (" ".join(text.split()) for text in (m.old, m.new))
        change = f"`{old}` → " + (f"`{new}`" if new else "(nothing)")
        change = change if m.old else f"launch: {_launch(m.launch)}"
        lines.append(f"| {m.kernel} | {m.what} | {change.replace('|', '/')} | {m.check} |")
    return "\n".join(lines) + "\n"


def _launch(launch: dict) -> str:
    shown = {k: list(v) if k == "buffers" else v for k, v in launch.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


if __name__ == "__main__":
    from tests.emulator.mutants import MUTANTS

    TABLE.write_text(table(MUTANTS), encoding="utf-8")
