"""Memory traffic of the kernels, counted by the emulator, beside MLX's kernels.

    python benchmarks/traffic.py            tables, then one line of JSON
    python benchmarks/traffic.py --write    also rewrite tests/goldens/traffic.json

No time is measured: the counters say what a kernel asks of a GPU's memory system, which is
necessary for speed and not sufficient. Columns, each over `ideal`, the bytes of weights, scales, or
keys and values that the work cannot do without:

    distinct_sectors      32-byte sectors that a threadgroup touches at least once
    instruction_sectors   32-byte sectors touched by each load instruction of a simdgroup, summed
    requested             bytes that lanes ask for
    streamed              distinct sectors of the weights or K,V buffers alone

`simd_per_kib` is simdgroup operations (sums, shuffles, matrix products) for 1024 ideal bytes.
Threadgroups are sampled evenly where there are many. OpenAI's figures are of an earlier count of
its Metal sources with these counters; no package installs its sources, so nothing counts them here.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes  # noqa: E402
from mlx_gptoss.kernels.registry import KERNELS  # noqa: E402
from mlx_gptoss.matrix import Matrix  # noqa: E402
from mlx_gptoss.metal.emulator import Report, emulate  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens" / "traffic.json"
OPENAI = {"experts_swiglu": {"distinct_sectors_ratio": 2.27, "instruction_sectors_ratio": 16.2}}

# The 20b's widths; 5 of its experts and 1408 of its ids: more of the same rows would tell nothing.
# 124 frozen tiles of 32 keys and 4 of the append segment are 8 for each of 16 splits.
MODEL = Sizes(
    batch=1, hidden=2880, inter=2880, q_heads=64, kv_heads=8, experts=5, vocab=1408, window=128,
    capacity=4096, rows=128, base=124 * 32, slot=127, splits=16, tokens=512,
)  # fmt: skip
AT_32K = replace(MODEL, capacity=32768, base=1020 * 32, splits=32)
SAMPLED = {  # threadgroups; the others run whole
    "attention_decode": 32,
    "attention_window_prefill": 16,
    "experts_down": 10,
    "experts_swiglu": 32,
    "out_residual": 20,
    "unembed": 4,
}
OF_BATCHES = ("expert_groups", "experts_down_grouped", "experts_sum", "experts_swiglu_grouped")
STREAMS = {
    "attention_decode": ("frozen_k", "frozen_v", "append_k", "append_v"),
    "attention_reduce": ("sums", "ends"),
    "attention_window": ("ring_k", "ring_v", "append_k", "append_v"),
    "attention_window_prefill": ("keys", "values"),
    "embed": ("table_w", "table_s", "table_o"),
    "expert_dispatch": ("experts",),
    "expert_groups": ("logits",),
    "experts_down": ("down_w", "down_s"),
    "experts_down_grouped": ("down_w", "down_s"),
    "experts_sum": ("sums",),
    "experts_swiglu": ("gate_w", "gate_s", "up_w", "up_s"),
    "experts_swiglu_grouped": ("gate_w", "gate_s", "up_w", "up_s"),
    "norm_qkv_rope": tuple(f"w{name}_{part}" for name in "qkv" for part in "wso"),
    "out_residual": ("wo_w", "wo_s", "wo_o"),
    "route": ("wr_w",),
    "sample_filtered": ("logits",),
    "sample_token": ("best",),
    "unembed": ("head_w", "head_s", "head_o"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The counters of one kernel."""

    threadgroups: int
    threads: int
    threadgroup_bytes: int
    distinct_sectors_ratio: float
    instruction_sectors_ratio: float
    requested_ratio: float
    streamed_ratio: float
    simd_per_kib: float


def packed_bytes(matrix: Matrix) -> int:
    """Bytes of codes, scales and offsets."""
    parts = (matrix.weight, matrix.scales, matrix.offsets)
    return sum(part.nbytes for part in parts if part is not None)


def ideal_bytes(stem: str, given: dict[str, Any], sizes: Sizes) -> float:
    """What a whole launch must read of what it streams."""
    row = 2 * sizes.kv_heads * 64 * 2  # K and V of one position, bfloat16
    match stem:
        case "attention_decode":
            return (sizes.base + sizes.slot + 1) * row
        case "attention_window":
            return sizes.window * row
        case "attention_window_prefill":
            return (sizes.window + sizes.tokens) * row
        case "attention_reduce":
            return given["sums"].nbytes + given["ends"].nbytes
        case "embed":
            return packed_bytes(given["matrix"]) / sizes.vocab
        case "expert_dispatch":
            return given["experts"].nbytes
        case "experts_down":
            return packed_bytes(given["down"]) * sizes.chosen / sizes.experts
        case "experts_swiglu":
            both = packed_bytes(given["gate"]) + packed_bytes(given["up"])
            return both * sizes.chosen / sizes.experts
        case "experts_down_grouped" | "experts_swiglu_grouped":
            filled = int((given["blocks"][:, 1] > 0).sum())
            matrices = [given[name] for name in ("gate", "up", "down") if name in given]
            return sum(map(packed_bytes, matrices)) * filled / sizes.experts
        case "expert_groups":
            return given["logits"].nbytes
        case "experts_sum":
            return given["sums"].nbytes
        case "norm_qkv_rope":
            return sum(packed_bytes(matrix) for matrix in given["projections"])
        case "sample_filtered":
            return given["logits"].nbytes
        case "sample_token":
            return given["best"].nbytes
    return packed_bytes(given["router" if stem == "route" else "matrix"])


def row_of(report: Report, ideal: float, streams: Sequence[str]) -> Row:
    """The ratios of one launch, sampled or not."""
    share = ideal * report.threadgroups_run / report.threadgroups_total
    traffic, totals = report.traffic(), report.totals()
    streamed = sum(t.distinct_sectors for n, t in report.buffer_traffic.items() if n in streams)
    return Row(
        threadgroups=report.threadgroups_total,
        threads=report.threadgroup[0] * report.threadgroup[1] * report.threadgroup[2],
        threadgroup_bytes=report.threadgroup_bytes,
        distinct_sectors_ratio=round(traffic.distinct_sectors * 32 / share, 4),
        instruction_sectors_ratio=round(traffic.instruction_sectors * 32 / share, 4),
        requested_ratio=round(traffic.bytes_requested / share, 4),
        streamed_ratio=round(streamed * 32 / share, 4),
        simd_per_kib=round(totals.simd_operations * 1024 / share, 2),
    )


def measure(stem: str, sizes: Sizes, *, dense: Dense) -> Row:
    """Run one kernel on bfloat16 activations and count."""
    if stem in ("route", "expert_dispatch", "expert_groups"):
        sizes = replace(sizes, experts=32)
    if stem == "experts_swiglu_grouped":  # whole: 64 rows of a matrix stand for all
        sizes = replace(sizes, inter=64)
    if stem == "experts_down_grouped":
        sizes = replace(sizes, hidden=64)
    given = KERNELS[stem].case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    sampled = SAMPLED.get(stem)
    with emulate(threadgroups=sampled, allow=("unwritten-output",)) as session:
        KERNELS[stem].launch(**given)
    return row_of(session.reports[0], ideal_bytes(stem, given, sizes), STREAMS[stem])


def golden_cases() -> dict[str, tuple[str, Dense, Sizes]]:
    """The kernels of a bfloat16 model with q8 dense matrices, and the plain and q4 forms of one.

    Those that share weights among the rows of a batch come with 8 rows, too, and with 16.
    """
    packed = {s for s, k in KERNELS.items() if k.dense} - {"route"}
    cases: list[tuple[str, Dense]] = [(s, "q8" if s in packed else "plain") for s in KERNELS]
    cases += [("out_residual", "plain"), ("out_residual", "q4")]
    found = {
        f"{stem} {dense}": (stem, dense, replace(MODEL, batch=8 if stem in OF_BATCHES else 1))
        for stem, dense in cases
    }
    for stem in ("norm_qkv_rope", "out_residual", "route", "unembed"):
        dense: Dense = "plain" if stem == "route" else "q8"
        for rows in (8,) if stem == "route" else (8, 16):
            found[f"{stem} {dense}, {rows} rows"] = stem, dense, replace(MODEL, batch=rows)
    return found


def table(rows: Mapping[str, Any]) -> str:
    """Rows, all of one dataclass, as text."""
    heads = [f.name.removesuffix("_ratio") for f in fields(next(iter(rows.values())))]
    first = max(map(len, rows))
    lines = [" " * first + "".join(f"  {head}" for head in heads)]
    for name, row in rows.items():
        values = zip(heads, asdict(row).values(), strict=True)
        lines.append(name.ljust(first) + "".join(f"  {v:>{len(head)}}" for head, v in values))
    return "\n".join(lines)


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the goldens of the tests")
    write = parser.parse_args().write
    ours = {
        name: measure(stem, sizes, dense=dense)
        for name, (stem, dense, sizes) in golden_cases().items()
    }
    if write:
        GOLDENS.write_text(json.dumps({n: asdict(r) for n, r in ours.items()}, indent=1) + "\n")
    ours["attention_decode 32k"] = measure("attention_decode", AT_32K, dense="plain")
    print(table(ours))
    from benchmarks.traffic_mlx import measure_mlx
    from benchmarks.traffic_prefill import compare_chunks

    mlx = measure_mlx(MODEL, AT_32K)
    print("\nMLX's kernels on the same work\n" + table(mlx))
    print("\nOpenAI's, counted earlier:", json.dumps(OPENAI))
    chunks = compare_chunks()
    print("\nSliding attention of a chunk; see traffic_prefill.py\n" + table(chunks))
    record = {"ours": ours, "mlx_lm": mlx, "window_of_chunks": chunks}
    plain = {name: {n: asdict(r) for n, r in rows.items()} for name, rows in record.items()}
    print(json.dumps(plain | {"openai": OPENAI}))


if __name__ == "__main__":
    main()
