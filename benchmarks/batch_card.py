"""What a step of 1 to 32 rows reads by our kernels and by MLX's products, and which are faster.

    python benchmarks/batch_card.py            a table, then one line of JSON
    python benchmarks/batch_card.py --write    also keep it in benchmarks/results

Bytes are of one layer (or the unembedding): 32-byte sectors that a threadgroup touches, summed over
threadgroups. Ours are counted by the emulator on sampled threadgroups of the published widths.
MLX's are ANALYTIC, from the tiles of its kernels and its choice among them on an M3 or M4 Max
(mlx/backend/metal of MLX 0.32.2 and later). A pass is one reading of a matrix W:

    rows       plain W                            q8 and q4
    1          a pass, x for every 8 rows of W    the same
    2 to 12    ceil(rows / 5) passes, x for       ceil(rows / 5) passes, x for every 8
               every 4; one pass of the
               unembedding
    13, 14     the same                           the same, and the unembedding as from 15 on
    15         the same                           a pass, x for every 32
    from 16    a pass, x for every 64             a pass, x for every 32

To that come the copies that MLX's forms make of append segments, of the router in float32 and of
logits. Its expert kernel reads an expert for each of its rows, unless they are sorted and 4 times
as many as the experts. Depths of MLX's forms are those of their graphs, fused as for Metal.

Rows choose their experts at random and independently of each other; real rows share more.

The choice is a PREDICTION: bytes over the bandwidth and dependent dispatches (decode_card.py) of
one chip. Caches, arithmetic and occupancy are not in it, and no Mac was asked. What a step makes of
it is in mlx_gptoss/kernels/batches.py.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.decode_card import EPOCH_S, MODELS, WEIGHT_SHARE  # noqa: E402
from benchmarks.traffic import MODEL, packed_bytes  # noqa: E402
from mlx_gptoss.chips import CHIPS  # noqa: E402
from mlx_gptoss.config import GPT_OSS_20B, ModelConfig  # noqa: E402
from mlx_gptoss.kernels.definitions import expert_groups  # noqa: E402
from mlx_gptoss.kernels.grouped import BLOCK  # noqa: E402
from mlx_gptoss.kernels.inputs import Dense, Inputs  # noqa: E402
from mlx_gptoss.kernels.matrix import row_blocks  # noqa: E402
from mlx_gptoss.kernels.registry import KERNELS  # noqa: E402
from mlx_gptoss.metal.emulator import emulate  # noqa: E402

ROWS = (1, 2, 3, 4, 6, 8, 9, 12, 13, 15, 16, 17, 20, 24, 28, 32)
RESULT = ROOT / "benchmarks" / "results" / "batch_card.json"
CHIP = "M4 Max"
DENSE = ("norm_qkv_rope", "out_residual", "unembed")
DEPTHS = {
    "norm_qkv_rope": {"ours": 1, "mlx": 4},
    "out_residual": {"ours": 1, "mlx": 2},
    "route": {"ours": 1, "mlx": 3},
    "unembed": {"ours": 1, "mlx": 12},
    "experts": {"rows": 2, "grouped": 4, "mlx": 8},
}
CUT = 64  # rows of an expert's matrix that stand for all
LOGIT_BYTES = 36  # of a logit and what is made of it, written and read between MLX's kernels


def launched_bytes(stem: str, given: dict[str, Any], sampled: int | None) -> float:
    """Sectors of a launch, in bytes."""
    with emulate(threadgroups=sampled, allow=("unwritten-output",)) as session:
        KERNELS[stem].launch(**given)
    report = session.reports[0]
    run = report.threadgroups_run / report.threadgroups_total
    return report.traffic().distinct_sectors * 32 / run


def product_bytes(whole: float, shape: tuple[int, int], rows: int, dense: Dense) -> float:
    """Bytes of MLX's product with a matrix of `whole` bytes; see above."""
    (count, columns), passes = shape, -(-rows // 5)
    vectors = rows * 2 * columns
    if rows == 1:
        return whole + count / 8 * vectors
    if dense == "plain":
        if rows >= 16:
            return whole + count / 64 * vectors
        return (passes if count < 65536 else 1) * whole + count / 4 * vectors
    if rows >= (15 if max(shape) <= 4096 else 13):
        return whole + count / 32 * vectors
    return passes * whole + count / 8 * vectors


def dense_bytes(stem: str, rows: int, dense: Dense) -> dict[str, float]:
    """Bytes of an operation that has the same widths in both models."""
    sizes = replace(MODEL, batch=rows)
    given = KERNELS[stem].case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    matrices = given.get("projections") or (given["matrix"],)
    columns, sampled, scale, copied = given["x"].shape[1], 6, 1.0, 0.0
    if stem == "norm_qkv_rope":  # one in 16 threadgroups, which hits those that copy once, too
        cut = row_blocks(rows, columns)
        sampled = (4 * (sizes.q_heads + 2 * sizes.kv_heads) // cut.tiles // 16 + 1) * cut.groups
        copied = 2 * sum(segment.nbytes for segment in given["append"])
    if stem == "unembed":
        scale = GPT_OSS_20B.vocab_size / sizes.vocab
        copied = rows * GPT_OSS_20B.vocab_size * LOGIT_BYTES
    theirs = copied
    for matrix in matrices:
        shape = (round(matrix.weight.shape[0] * scale), columns)
        theirs += product_bytes(packed_bytes(matrix) * scale, shape, rows, dense)
    return {"ours": launched_bytes(stem, given, sampled) * scale, "mlx": theirs}


def route_bytes(config: ModelConfig, rows: int) -> dict[str, float]:
    """Bytes of the router, whose product MLX makes in float32."""
    sizes = replace(MODEL, batch=rows, experts=config.num_local_experts)
    given = KERNELS["route"].case(Inputs(sizes, dtype=mx.bfloat16))
    whole, shape = packed_bytes(given["router"]), given["router"].weight.shape
    product = product_bytes(2 * whole, (shape[0], 2 * shape[1]), max(rows, 16), "plain")
    return {"ours": launched_bytes("route", given, None), "mlx": 3 * whole + product}


@cache
def block_bytes(pairs: int) -> float:
    """Bytes of both grouped kernels for one block of so many pairs."""
    total = 0.0
    for stem, cut in (("experts_swiglu", "inter"), ("experts_down", "hidden")):
        sizes = replace(MODEL, batch=pairs, **{cut: CUT})
        given = KERNELS[f"{stem}_grouped"].case(Inputs(sizes, dtype=mx.bfloat16))
        blocks, _ = expert_groups(mx.zeros((pairs, sizes.experts)), chosen=sizes.chosen)
        found = launched_bytes(f"{stem}_grouped", given | {"blocks": blocks}, None)
        total += found / sizes.chosen * getattr(MODEL, cut) / CUT
    return total


@cache
def pair_bytes() -> float:
    """Bytes of both kernels of single rows for one pair."""
    total = 0.0
    for stem, sampled in (("experts_swiglu", 32), ("experts_down", 10)):
        given = KERNELS[stem].case(Inputs(MODEL, dtype=mx.bfloat16))
        total += launched_bytes(stem, given, sampled) / MODEL.chosen
    return total


def expert_bytes(config: ModelConfig, rows: int) -> dict[str, float]:
    """Bytes of the experts of a layer: by rows, grouped, and MLX's."""
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    random, draws = np.random.default_rng(0), 300
    counts = np.zeros((draws, experts), int)
    for draw in counts:
        for _ in range(rows):
            draw[random.permutation(experts)[:chosen]] += 1
    full, rest = counts // BLOCK, counts % BLOCK
    grouped = full.sum() / draws * block_bytes(BLOCK)
    grouped += sum((rest == n).sum() / draws * block_bytes(n) for n in range(1, BLOCK))
    sums = KERNELS["experts_sum"].case(Inputs(replace(MODEL, batch=rows), dtype=mx.bfloat16))
    grouped += launched_bytes("experts_sum", sums, None) + sums["sums"].nbytes
    width, pairs = config.hidden_size, rows * chosen
    whole = 3 * width * width * 17 / 32
    sorted_tiles = pairs >= 16 and pairs >= 4 * experts  # its kernel for sorted rows
    if sorted_tiles:
        theirs = float((counts > 0).sum()) / draws * whole + 3 * width / 32 * pairs * 2 * width
    else:
        theirs = pairs * (whole + 3 * width / 8 * 2 * width)
    return {"rows": rows * chosen * pair_bytes(), "grouped": grouped, "mlx": theirs}


def predicted_us(bytes_of: Mapping[str, float], depth_of: Mapping[str, int]) -> dict[str, float]:
    """Microseconds of each form on the chip."""
    chip = max((c for c in CHIPS if c.name == CHIP), key=lambda c: c.bandwidth_gb_per_s)
    epoch_us = 1e6 * EPOCH_S * (1 - 0.1 * (chip.generation - 1))
    rate = chip.bandwidth_gb_per_s * 1e3 * WEIGHT_SHARE
    return {form: bytes_of[form] / rate + depth * epoch_us for form, depth in depth_of.items()}


def row(model: str, operation: str, packing: str, batch: int, found: Mapping[str, float]) -> Any:
    """One line of the card."""
    times = predicted_us(found, DEPTHS[operation])
    return {
        "model": model,
        "operation": operation,
        "packing": packing,
        "rows": batch,
        "mb": {form: round(value / 1e6, 2) for form, value in found.items()},
        "predicted_us": {form: round(value, 1) for form, value in times.items()},
        "fastest": min(times, key=lambda form: times[form]),
    }


def card() -> dict[str, Any]:
    """Bytes of each operation, packing, model and batch, and the form that wins."""
    rows = []
    for batch in ROWS:
        for packing in get_args(Dense):
            for stem in DENSE:
                found = dense_bytes(stem, batch, packing)
                rows.append(row("both", stem, packing, batch, found))
        for name, config in MODELS.items():
            rows.append(row(name, "route", "plain", batch, route_bytes(config, batch)))
            rows.append(row(name, "experts", "mxfp4", batch, expert_bytes(config, batch)))
    order = {name: place for place, name in enumerate(DEPTHS)}
    rows.sort(key=lambda r: (r["model"] != "both", order[r["operation"]], r["packing"], r["model"]))
    return {"chip": CHIP, "rows": rows}


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the card")
    write = parser.parse_args().write
    found = card()
    print(f"MB of a layer, PREDICTED microseconds on the {CHIP}, and the form that wins")
    for line in found["rows"]:
        forms = "  ".join(
            f"{form} {line['mb'][form]:>8} {time:>7}" for form, time in line["predicted_us"].items()
        )
        name = f"{line['model']:5}{line['operation']:14}{line['packing']:6}{line['rows']:>3}"
        print(f"{name}  {forms}  {line['fastest']}")
    if write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
