"""What a step of 1 to 32 rows reads by our kernels and by MLX's, and which of them to use.

    python benchmarks/batch_card.py            a table, then one line of JSON
    python benchmarks/batch_card.py --write    also keep it in benchmarks/results

Bytes are of one layer (or the unembedding): 32-byte sectors that a threadgroup touches, summed over
threadgroups. Ours are counted by the emulator on sampled threadgroups of the published widths.
MLX's are ANALYTIC, from the tiles of its kernels and its choice among them (mlx/backend/metal of
MLX 0.32): a vector kernel for each row reads W and, for every 8 rows of W, x; a GEMM reads W once,
and x for every 32 rows of W (64 if plain). Its expert kernel reads an expert for each of its rows.
Depths of MLX's paths are counted by hand in definitions.py, with elementwise chains fused.

Rows choose their experts at random and independently of each other; real rows share more.

The choice is a PREDICTION: bytes over the bandwidth and dependent dispatches (decode_card.py) of
one chip. Caches, arithmetic and occupancy are not in it, and no Mac was asked.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.decode_card import EPOCH_S, MODELS, WEIGHT_SHARE  # noqa: E402
from benchmarks.traffic import MODEL, packed_bytes  # noqa: E402
from mlx_gptoss.chips import CHIPS  # noqa: E402
from mlx_gptoss.config import ModelConfig  # noqa: E402
from mlx_gptoss.kernels.definitions import expert_groups  # noqa: E402
from mlx_gptoss.kernels.grouped import BLOCK  # noqa: E402
from mlx_gptoss.kernels.inputs import Dense, Inputs  # noqa: E402
from mlx_gptoss.kernels.registry import KERNELS  # noqa: E402
from mlx_gptoss.metal.emulator import emulate  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32)
RESULT = ROOT / "benchmarks" / "results" / "batch_card.json"
CHIP = "M4 Max"
DENSE = ("norm_qkv_rope", "out_residual", "route", "unembed")
MLX_DEPTH = {"norm_qkv_rope": 4, "out_residual": 2, "route": 2, "unembed": 6, "experts": 8}
OUR_DEPTH = {"rows": 2, "grouped": 4}
CUT = 64  # rows of an expert's matrix that stand for all


def launched_bytes(stem: str, given: dict[str, Any], sampled: int | None) -> float:
    """Sectors of a launch, in bytes."""
    with emulate(threadgroups=sampled, allow=("unwritten-output",)) as session:
        KERNELS[stem].launch(**given)
    report = session.reports[0]
    run = report.threadgroups_run / report.threadgroups_total
    return report.traffic().distinct_sectors * 32 / run


def dense_bytes(config: ModelConfig, stem: str, rows: int, dense: Dense) -> tuple[float, float]:
    """Bytes of a dense operation, ours and MLX's."""
    sizes = replace(MODEL, batch=rows, experts=config.num_local_experts)
    dense = "plain" if stem == "route" else dense
    given = KERNELS[stem].case(Inputs(sizes, dtype=mx.bfloat16, dense=dense))
    parts = given.get("projections") or (given["router" if stem == "route" else "matrix"],)
    scale = config.vocab_size / sizes.vocab if stem == "unembed" else 1
    theirs = 0.0
    for matrix in parts:
        count, width = matrix.weight.shape[0], given["x"].shape[1]
        whole, vector = packed_bytes(matrix), 2 * width
        limit = 2 if dense == "plain" else 10 if stem == "unembed" else 12
        if rows < limit:
            theirs += rows * (whole + count / 8 * vector)
        else:
            theirs += whole + count / (64 if dense == "plain" else 32) * rows * vector
    return launched_bytes(stem, given, 6) * scale, theirs * scale


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


def fastest(bytes_of: dict[str, float], depth_of: dict[str, int], chip: Any) -> str:
    """The path of least predicted time."""
    epoch_s = EPOCH_S * (1 - 0.1 * (chip.generation - 1))
    rate = chip.bandwidth_gb_per_s * 1e9 * WEIGHT_SHARE
    return min(bytes_of, key=lambda path: bytes_of[path] / rate + depth_of[path] * epoch_s)


def card(dense: Dense) -> dict[str, Any]:
    """Bytes of each operation, model and batch, and the path chosen."""
    chip = max((c for c in CHIPS if c.name == CHIP), key=lambda c: c.bandwidth_gb_per_s)
    rows: list[dict[str, Any]] = []
    for name, config in MODELS.items():
        for batch in ROWS:
            for stem in DENSE:
                if stem != "route" and name == "120b":
                    continue  # the same widths
                ours, theirs = dense_bytes(config, stem, batch, dense)
                found = {"ours": ours, "mlx": theirs}
                depths = {"ours": 1, "mlx": MLX_DEPTH[stem]}
                rows.append(row(name, stem, batch, found, fastest(found, depths, chip)))
            found = expert_bytes(config, batch)
            depths = OUR_DEPTH | {"mlx": MLX_DEPTH["experts"]}
            rows.append(row(name, "experts", batch, found, fastest(found, depths, chip)))
    return {"dense": dense, "chip": CHIP, "rows": rows}


def row(model: str, operation: str, batch: int, found: dict[str, float], path: str) -> Any:
    """One line of the card."""
    megabytes = {name: round(value / 1e6, 2) for name, value in found.items()}
    return {"model": model, "operation": operation, "rows": batch, "mb": megabytes, "path": path}


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the cards")
    write = parser.parse_args().write
    cards = [card("plain"), card("q8")]
    for found in cards:
        print(f"\n{found['dense']} dense weights; MB of a layer; PREDICTED for the {found['chip']}")
        for line in found["rows"]:
            sizes = "  ".join(f"{name} {value:>9}" for name, value in line["mb"].items())
            print(
                f"{line['model']:5}{line['operation']:15}{line['rows']:>3}  {sizes}  {line['path']}"
            )
    text = json.dumps(cards)
    if write:
        RESULT.write_text(json.dumps(cards, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
