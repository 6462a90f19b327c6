"""All records in one self-contained HTML page: what was measured, beside limits and predictions.

No script, no font and no picture is fetched; plots are SVG, colours follow the reader's light or
dark setting. What nobody has measured is a line and called a prediction; a measurement is a dot.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mlx_gptoss.bench_plots import Bar, Curve, Point, bars, over_depth
from mlx_gptoss.bench_runs import OURS
from mlx_gptoss.bench_text import (
    TITLES,
    embedding_in_file,
    machine_line,
    table_cells,
    with_spread,
)
from mlx_gptoss.chips import CHIPS, GIB, Chip, default_working_set_bytes
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from mlx_gptoss.machine import Machine
from mlx_gptoss.plan import MemoryPlan, dense_quantization
from mlx_gptoss.roofline import (
    limit_tok_per_s,
    predicted_prefill_tok_per_s,
    predicted_tok_per_s,
    prefill_limit_tok_per_s,
)

DEPTH = 1024  # of the plot by chip
DEPTHS = tuple(2**n for n in range(9, 18))
SHOWN = ("M1 Max", "M2 Max", "M4 Pro", "M4 Max", "M5 Max", "M3 Ultra")  # curves by depth
MODELS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
PREFILL, DECODE = "prefill_tok_per_s", "decode_tok_per_s"
Record = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5c6675; --paper: #ffffff;
  --line: #d8dde4; --limit: #dfe5ec; --guess: #3d6fb6; --real: #c2410c; --peer: #4d7c0f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #9aa5b4; --paper: #14181f;
  --line: #333c49; --limit: #3a4554; --guess: #7fb0f5; --real: #fb923c; --peer: #a3e635; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p, td, th { color: var(--ink); } .dim { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; }
td, th, .item { white-space: nowrap; } .wide { overflow-x: auto; } .wide svg { min-width: 560px; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair > div { flex: 1 1 380px; min-width: 0; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg.mark { width: 22px; height: 12px; } svg .axis { stroke: var(--line); }
svg .limit { fill: var(--limit); }
svg .limit.line { fill: none; stroke: var(--dim); stroke-dasharray: 3 4; }
svg .guess { fill: none; stroke: var(--guess); stroke-width: 2; }
svg .real { fill: var(--real); } svg .peer { fill: var(--peer); }
svg .spread { stroke-width: 2; } svg .real.spread { stroke: var(--real); }
svg .peer.spread { stroke: var(--peer); }
svg .dim { fill: var(--dim); font-size: 12px; } svg .number { fill: var(--guess); }
"""


def as_html(records: Sequence[Record]) -> str:
    """The page.

    Args:
        records: as `bench.bench` returns them; there may be none.
    """
    count = f"{len(records)} record{'' if len(records) == 1 else 's'}"
    body = [
        "<h1>gpt-oss on Apple silicon: measured, possible, predicted</h1>",
        f"<p>{count}. <b>Limit</b>: of decoding, the bytes that a token must read, over the chip's "
        "bandwidth; of a prompt, its arithmetic over the chip's peak, which of M5 is a projection. "
        "<b>Prediction</b>: a model "
        "fitted to speeds that others published for other programs; nobody has measured it. "
        "Depth is the number of tokens before the one that is decoded; dense weights are bf16.</p>",
        _legend(),
    ]
    for name, config in MODELS.items():
        body += _published(name, config, records)
    body.append("<h2>Every record</h2>")
    body += [part for record in records for part in _one(record)] or [
        '<p class="dim">Nothing yet: run mlx-gptoss bench on a Mac, and send the record.</p>'
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>gpt-oss benchmarks</title><style>{STYLE}</style></head>\n"
        "<body>" + "\n".join(body) + "</body></html>\n"
    )


def _legend() -> str:
    marks = (
        ("limit", '<rect class="limit" width="22" height="12"/>'),
        ("prediction", '<line class="guess" x1="0" x2="22" y1="6" y2="6"/>'),
        ("measured, mlx-gptoss", '<circle class="real" cx="11" cy="6" r="5"/>'),
        ("measured, mlx-lm", '<circle class="peer" cx="11" cy="6" r="5"/>'),
    )
    items = (
        f'<span class="item"><svg class="mark" viewBox="0 0 22 12" aria-hidden="true">{mark}</svg> '
        f"{text}</span>"
        for text, mark in marks
    )
    return f'<p class="dim">{" &ensp; ".join(items)}</p>'


def _published(name: str, config: ModelConfig, records: Sequence[Record]) -> Iterator[str]:
    """Plots of a published model: all chips, and what was measured of one row."""
    packing = dense_quantization(config, "bf16")
    chips = [chip for chip in CHIPS if _holds(chip, packing, config)]
    yield f"<h2>Decode by chip: {name}, depth {DEPTH}, tokens/s</h2>"
    rows = [
        Bar(
            name=chip.name,
            detail=" or ".join(map(str, chip.gpu_cores)) + " cores",
            limit=limit_tok_per_s(config, packing, chip, depth=DEPTH),
            guess=predicted_tok_per_s(config, packing, chip, depth=DEPTH),
            points=[
                _point(result, DECODE)
                for owner, result in _of_model(config, records)
                if owner == chip and abs(math.log2(result["depth"] / DEPTH)) <= 1
            ],
        )
        for chip in chips
    ]
    yield _wide(bars(rows, label=f"{name}: decode limit, prediction and measurements by chip"))
    shown = [
        max((c for c in chips if c.name == name), key=lambda c: c.bandwidth_gb_per_s)
        for name in SHOWN
        if any(c.name == name for c in chips)
    ]
    decode: list[Curve] = []
    prefill: list[Curve] = []
    for chip in shown:
        guesses = [(d, predicted_tok_per_s(config, packing, chip, depth=d)) for d in DEPTHS]
        limits = [(d, limit_tok_per_s(config, packing, chip, depth=d)) for d in DEPTHS]
        decode += _curves(chip.name, limits, guesses)
        guesses = [(d, predicted_prefill_tok_per_s(config, chip, prompt=d)) for d in DEPTHS]
        limits = [(d, prefill_limit_tok_per_s(config, chip, prompt=d)) for d in DEPTHS]
        prefill += _curves(chip.name, limits, guesses)
    measured = [result for _, result in _of_model(config, records)]
    for what, metric, curves in (("Decode", DECODE, decode), ("Prefill", PREFILL, prefill)):
        by = "depth" if metric == DECODE else "length of the prompt"
        yield f"<h2>{what} by {by}: {name}, tokens/s</h2>"
        points = [_point(result, metric) for result in measured]
        yield _wide(over_depth(curves, points, label=f"{name}: {what.lower()} speed by {by}"))


def _curves(
    name: str, limits: list[tuple[int, float]], guesses: list[tuple[int, float]]
) -> Iterator[Curve]:
    yield Curve(name="", kind="limit", values=limits)
    yield Curve(name=name, kind="guess", values=guesses)


def _of_model(
    config: ModelConfig, records: Sequence[Record]
) -> Iterator[tuple[Chip | None, Record]]:
    """Chip and result of every measurement of a published model, of one row and bf16 weights."""
    size = (config.num_hidden_layers, config.hidden_size, config.num_local_experts)
    for record in records:
        model = record["model"]
        if (model["layers"], model["hidden"], model["experts"]) != size or model["dense"] != "bf16":
            continue
        for result in record["results"]:
            if result["batch"] == 1:
                yield Machine(**record["machine"]).chip, result


def _holds(chip: Chip, packing: Any, config: ModelConfig) -> bool:
    wanted = MemoryPlan(config=config, packing=packing, context=DEPTH)
    return default_working_set_bytes(max(chip.memory_gib) * GIB) >= wanted.total_bytes


def _point(result: Record, metric: str) -> Point:
    speed = result[metric]
    where = f"depth {result['depth']}, batch {result['batch']}"
    return Point(
        depth=result["depth"],
        speed=speed["median"],
        spread=speed["spread"],
        kind="real" if result["engine"] == OURS else "peer",
        label="" if result["batch"] == 1 else f"×{result['batch']}",
        title=f"{result['engine']}, {where}: {with_spread(speed)} tok/s",
    )


def _one(record: Record) -> Iterator[str]:
    """A record: where it was made, decode and prefill with their spread, and all numbers."""
    model, results = record["model"], record["results"]
    in_file = embedding_in_file(record)
    yield f"<h3>{escape(model['name'])}: {model['nbytes'] / 1e9:.2f} GB{in_file}</h3>"
    software = ", ".join(f"{name} {value}" for name, value in record["software"].items())
    yield f'<p class="dim">{escape(machine_line(record))}; {escape(software)}; '
    yield f"{escape(record['date'][:10])}</p>"
    plots = []
    for what, metric in (("decode", DECODE), ("prefill", PREFILL)):
        points = [_point(result, metric) for result in results]
        limits = {r["depth"]: r["limit_tok_per_s"] for r in results if r["batch"] == 1}
        known = metric == DECODE and len(limits) > 1 and all(limits.values())
        curves = [Curve(name="", kind="limit", values=sorted(limits.items()))] if known else []
        plot = over_depth(curves, points, label=f"{model['name']}: {what}", width=430)
        plots.append(f"<div>{what}, tokens/s of all rows, by depth; ×N: N rows{plot}</div>")
    yield f'<div class="pair">{"".join(plots)}</div>'
    yield _wide(_table(results))


def _table(results: Sequence[Record]) -> str:
    def row(cells: Sequence[str], mark: str) -> str:
        return "<tr>" + "".join(f"<{mark}>{escape(c)}</{mark}>" for c in cells) + "</tr>"

    rows = [row(TITLES, "th"), *(row(table_cells(result), "td") for result in results)]
    return "<table>" + "".join(rows) + "</table>"


def _wide(content: str) -> str:
    return f'<div class="wide">{content}</div>'
