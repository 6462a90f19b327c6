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

from mlx_gptoss.config import GPT_OSS_20B  # noqa: E402
from mlx_gptoss.kernels.grouped import GROUPED  # noqa: E402
from mlx_gptoss.kernels.inputs import Dense, Inputs, Sizes  # noqa: E402
from mlx_gptoss.kernels.registry import KERNELS  # noqa: E402
from mlx_gptoss.matrix import Matrix  # noqa: E402
from mlx_gptoss.metal.emulator import Report, emulate  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens" / "traffic.json"
OPENAI = {"experts_swiglu": {"distinct_sectors_ratio": 2.27, "instruction_sectors_ratio": 16.2}}

# The models' widths; 5 experts and 1408 ids: more of the same rows would tell nothing.
# 124 frozen tiles of 32 keys and 4 of the append segment are 8 for each of 16 splits.
MODEL = Sizes(
    batch=1, hidden=2880, inter=2880, q_heads=64, kv_heads=8, experts=5, vocab=1408, window=128,
    capacity=4096, rows=128, base=124 * 32, slot=127, splits=16, tokens=512,
)  # fmt: skip
AT_32K = replace(MODEL, capacity=32768, base=1020 * 32, splits=32)
SAMPLED = {  # threadgroups; the others run whole
    "attention_decode": 32,
    "attention_window_prefill": 16,
    "norm_qkv_rope": 44,
    "out_residual": 20,
    "qkv_rope": 31,
    "rms_norm": 32,
    "route_prefill": 2,
    "sum_pairs": 16,
    "swiglu_pairs": 16,
    "unembed": 4,
}
EXPERTS = {"20b": 32, "120b": 128}  # all in which the shapes of the two differ
OF_EXPERTS = {  # with some rows of their matrices
    "expert_dispatch": {},
    "expert_groups": {},
    "experts_down": {"hidden": 160},
    "experts_down_grouped": {"hidden": 64},
    "experts_swiglu": {"inter": 128},
    "experts_swiglu_grouped": {"inter": 64},
    "route": {},
    "route_prefill": {},
    "sum_pairs": {"tokens": 64},
    "swiglu_pairs": {"tokens": 64},
}
ROUTERS = ("route", "route_prefill")
OF_VOCABULARY = ("sample_filtered", "sample_token")  # which read all logits, but no weights
BATCHES = dict.fromkeys(("norm_qkv_rope", "out_residual", "route", "unembed"), (1, 2, 4, 8, 16))
BATCHES |= dict.fromkeys(GROUPED, (8, 2, 4))
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
    "extend_ring": ("ring_keys", "ring_values", "new_keys", "new_values"),
    "norm_qkv_rope": tuple(f"w{name}_{part}" for name in "qkv" for part in "wso"),
    "out_residual": ("wo_w", "wo_s", "wo_o"),
    "qkv_rope": ("q", "k", "v"),
    "rms_norm": ("x",),
    "route": ("wr_w", "wr_s", "wr_o"),
    "route_prefill": ("x", "wr_w", "wr_s", "wr_o"),
    "sample_filtered": ("logits",),
    "sample_token": ("best",),
    "sum_pairs": ("z", "residual"),
    "swiglu_pairs": ("gate", "up"),
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
        case "attention_window_prefill" | "extend_ring":
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
        case "qkv_rope" | "swiglu_pairs":
            return sum(product.nbytes for product in given["products"])
        case "rms_norm":
            return given["x"].nbytes
        case "route_prefill":
            return given["x"].nbytes + packed_bytes(given["router"])
        case "sample_filtered":
            return given["logits"].nbytes
        case "sample_token":
            return given["best"].nbytes
        case "sum_pairs":
            return given["z"].nbytes + given["residual"].nbytes
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
    given = KERNELS[stem].case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    sampled = SAMPLED.get(stem)
    with emulate(threadgroups=sampled, allow=("unwritten-output",)) as session:
        KERNELS[stem].launch(**given)
    return row_of(session.reports[0], ideal_bytes(stem, given, sizes), STREAMS[stem])


def golden_cases() -> dict[str, tuple[str, Dense, Sizes]]:
    """Every kernel at the shapes of both models: dense matrices in each form, and in batches.

    The form that is counted in batches is q8; the router's is plain, as it is published.
    """
    found: dict[str, tuple[str, Dense, Sizes]] = {}
    for stem, kernel in KERNELS.items():
        sizes = replace(MODEL, **OF_EXPERTS.get(stem, {}))
        if stem in OF_VOCABULARY:
            sizes = replace(sizes, vocab=GPT_OSS_20B.vocab_size)
        usual: Dense = "q8" if kernel.dense and stem not in ROUTERS else "plain"
        forms: list[Dense] = ["plain", "q8", "q4"] if kernel.dense else ["plain"]
        first, *more = BATCHES.get(stem, (1,))
        lines = [(dense, first) for dense in forms] + [(usual, rows) for rows in more]
        for model, experts in EXPERTS.items():
            if stem not in OF_EXPERTS:
                model, experts = "", MODEL.experts
            for dense, rows in lines if model != "120b" else [(usual, first)]:
                batch = f"{rows} rows" if rows > 1 else ""
                name = ", ".join(filter(None, (f"{stem} {dense}", batch, model)))
                found[name] = stem, dense, replace(sizes, batch=rows, experts=experts)
    return found


def table(rows: Mapping[str, Any]) -> str:
    """Rows, all of one dataclass, as text."""
    heads = [f.name.removesuffix("_ratio") for f in fields(next(iter(rows.values())))]
    first = max(map(len, rows))
    lines = [" " * first + "".join(f"  {head}" for head in heads)]
    for name, row in rows.items():
        values = zip(heads, asdict(row).values(), strict=True)
        cells = [f"  {'' if v is None else v:>{len(head)}}" for head, v in values]
        lines.append(name.ljust(first) + "".join(cells))
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
