"""All records in one self-contained HTML page: what was measured, beside limits and predictions.

No script, no font and no picture is fetched; plots are SVG, colours follow the reader's light or
dark setting. What nobody has measured is drawn hollow and called a prediction.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mlx_gptoss.bench_runs import OURS
from mlx_gptoss.chips import CHIPS, Chip
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from mlx_gptoss.plan import dense_quantization
from mlx_gptoss.roofline import limit_tok_per_s, predicted_tok_per_s

WIDTH, LEFT, RIGHT, ROW = 860, 160, 80, 24
DEPTH = 1024  # of the plot by chip
DEPTHS = tuple(2**n for n in range(9, 18))
SHOWN = ("M1 Max", "M2 Max", "M4 Pro", "M4 Max", "M5 Max", "M3 Ultra")  # curves by depth
MODELS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5c6675; --paper: #ffffff;
  --line: #d8dde4; --limit: #e3e8ef; --guess: #3d6fb6; --real: #c2410c; --peer: #4d7c0f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #9aa5b4; --paper: #14181f;
  --line: #333c49; --limit: #2a323d; --guess: #7fb0f5; --real: #fb923c; --peer: #a3e635; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, td, th, figcaption { color: var(--ink); } .dim { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg.mark { width: 22px; height: 12px; } svg .axis { stroke: var(--line); }
svg .limit { fill: var(--limit); }
svg .guess { fill: none; stroke: var(--guess); stroke-width: 2; }
svg .real { fill: var(--real); } svg .peer { fill: var(--peer); }
svg .dim { fill: var(--dim); font-size: 12px; } svg .number { fill: var(--guess); }
"""


def as_html(records: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        records: as `bench.bench` returns them; there may be none.
    """
    body = [
        "<h1>gpt-oss on Apple silicon: measured, possible, predicted</h1>",
        f"<p>{_count(len(records))}. <b>Limit</b>: the bytes that a token must read, over the "
        "chip's bandwidth. <b>Prediction</b>: a model fitted to speeds that others published for "
        "other programs; nobody has measured it. Depth is the number of tokens before the one "
        "that is decoded; dense weights are bf16.</p>",
        _legend(),
    ]
    for name, config in MODELS.items():
        body.append(f"<h2>Decode by chip: {name}, depth {DEPTH}, tokens/s</h2>")
        body.append(_by_chip(config, records))
        body.append(f"<h2>Decode by depth: {name}, tokens/s</h2>")
        body.append(_by_depth(config, records))
    body.append("<h2>Everything that was measured</h2>")
    body.append(_table(records))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>gpt-oss benchmarks</title><style>{STYLE}</style></head>\n"
        "<body>" + "\n".join(body) + "</body></html>\n"
    )


def _count(records: int) -> str:
    return f"{records} record{'' if records == 1 else 's'}"


def _legend() -> str:
    marks = (
        ("limit", '<rect class="limit" width="22" height="12"/>'),
        ("prediction", '<line class="guess" x1="0" x2="22" y1="6" y2="6"/>'),
        ("measured, mlx-gptoss", '<circle class="real" cx="11" cy="6" r="5"/>'),
        ("measured, mlx-lm", '<circle class="peer" cx="11" cy="6" r="5"/>'),
    )
    return (
        '<p class="dim">'
        + " &nbsp; ".join(
            f'<svg class="mark" viewBox="0 0 22 12" aria-hidden="true">{mark}</svg> {text}'
            for text, mark in marks
        )
        + "</p>"
    )


def _of_model(
    config: ModelConfig, records: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Chip and result of every measurement of a published model with bf16 dense weights."""
    size = (config.num_hidden_layers, config.hidden_size, config.num_local_experts)
    for record in records:
        model = record["model"]
        if (model["layers"], model["hidden"], model["experts"]) != size or model["dense"] != "bf16":
            continue
        for result in record["results"]:
            yield (record["machine"]["cpu"] or "").removeprefix("Apple "), result


def _by_chip(config: ModelConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """A bar to the limit, a tick at the prediction, a dot where somebody measured."""
    packing = dense_quantization(config, "bf16")
    chips = [chip for chip in CHIPS if _holds(chip, packing, config)]
    limits = [limit_tok_per_s(config, packing, chip, depth=DEPTH) for chip in chips]
    scale = (WIDTH - LEFT - RIGHT) / max(limits)
    parts = []
    for n, (chip, limit) in enumerate(zip(chips, limits, strict=True)):
        y, guess = n * ROW, predicted_tok_per_s(config, packing, chip, depth=DEPTH)
        cores = " or ".join(map(str, chip.gpu_cores))
        at = LEFT + guess * scale
        parts += [
            f'<text x="0" y="{y + 16}">{chip.name} <tspan class="dim">{cores} cores</tspan></text>',
            f'<rect class="limit" x="{LEFT}" y="{y + 3}" width="{limit * scale:.1f}" height="18"/>',
            f'<line class="guess" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 2}" y2="{y + 22}"/>',
            f'<text class="dim" x="{LEFT + limit * scale + 6:.1f}" y="{y + 16}">'
            f'<tspan class="number">{guess:.0f}</tspan> of {limit:.0f}</text>',
        ]
        for name, result in _of_model(config, records):
            if name == chip.name and abs(math.log2(result["depth"] / DEPTH)) <= 1:
                parts.append(
                    _dot(LEFT + result["decode_tok_per_s"]["median"] * scale, y + 12, result)
                )
    return _svg(len(chips) * ROW, parts, "limit, prediction and measurements by chip")


def _holds(chip: Chip, packing: Any, config: ModelConfig) -> bool:
    from mlx_gptoss.chips import GIB, default_working_set_bytes
    from mlx_gptoss.plan import MemoryPlan

    wanted = MemoryPlan(config=config, packing=packing, context=DEPTH)
    return default_working_set_bytes(max(chip.memory_gib) * GIB) >= wanted.total_bytes


def _by_depth(config: ModelConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """Predicted curves of some chips over a logarithmic depth, and every measured point."""
    packing, height = dense_quantization(config, "bf16"), 300
    chips = [
        max((c for c in CHIPS if c.name == name), key=lambda c: c.bandwidth_gb_per_s)
        for name in SHOWN
    ]
    chips = [chip for chip in chips if _holds(chip, packing, config)]
    curves = {
        chip.name: [predicted_tok_per_s(config, packing, chip, depth=d) for d in DEPTHS]
        for chip in chips
    }
    measured = list(_of_model(config, records))
    top = max(
        [max(c) for c in curves.values()] + [r["decode_tok_per_s"]["median"] for _, r in measured]
    )
    low, high = math.log2(DEPTHS[0]), math.log2(DEPTHS[-1])

    def x(depth: float) -> float:
        place = min(max(math.log2(depth), low), high)
        return 50 + (place - low) / (high - low) * (WIDTH - 50 - 130)

    def y(speed: float) -> float:
        return height - 30 - speed / top * (height - 50)

    parts = list(_axes(x, y, top, height))
    for curve in curves.values():
        points = " ".join(f"{x(d):.1f},{y(v):.1f}" for d, v in zip(DEPTHS, curve, strict=True))
        parts.append(f'<polyline class="guess" points="{points}"/>')
    for name, place in _spread({name: y(curve[-1]) for name, curve in curves.items()}):
        parts.append(f'<text x="{WIDTH - 124}" y="{place + 4:.1f}">{name}</text>')
    parts += [_dot(x(r["depth"]), y(r["decode_tok_per_s"]["median"]), r) for _, r in measured]
    return _svg(height, parts, "predicted decode speed over depth, with measurements")


def _spread(places: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Labels moved apart from the lowest upwards, so that none covers another."""
    last = math.inf
    for name, place in sorted(places.items(), key=lambda item: -item[1]):
        last = min(place, last - 15)
        yield name, last


def _axes(x: Any, y: Any, top: float, height: int) -> Iterator[str]:
    step = 10 ** math.floor(math.log10(top))
    step = step / 2 if top / step < 3 else step
    for n in range(int(top / step) + 1):
        at = y(n * step)
        yield f'<line class="axis" x1="50" x2="{WIDTH - 130}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="dim" x="42" y="{at + 4:.1f}" text-anchor="end">{n * step:g}</text>'
    for depth in DEPTHS:
        label = f"{depth // 1024}k" if depth >= 1024 else str(depth)
        yield (
            f'<text class="dim" x="{x(depth):.1f}" y="{height - 8}" text-anchor="middle">{label}'
            "</text>"
        )


def _dot(x: float, y: float, result: Mapping[str, Any]) -> str:
    kind = "real" if result["engine"] == OURS else "peer"
    speed = result["decode_tok_per_s"]
    title = f"{result['engine']}, depth {result['depth']}: {speed['median']:.4g} tok/s"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return '<p class="dim">Nothing yet: run mlx-gptoss bench on a Mac, and send the record.</p>'
    titles = "machine|model|engine|depth|prefill tok/s|decode tok/s|first token s|of limit|date"
    rows = ["<tr>" + "".join(f"<th>{title}</th>" for title in titles.split("|")) + "</tr>"]
    for record in records:
        machine, model = record["machine"], record["model"]
        place = machine["cpu"] or machine["architecture"]
        for r in record["results"]:
            share = "" if r["share_of_limit"] is None else f"{100 * r['share_of_limit']:.0f} %"
            speeds = [
                f"{r[m]['median']:.4g} ± {r[m]['sd']:.2g}"
                for m in ("prefill_tok_per_s", "decode_tok_per_s", "ttft_s")
            ]
            cells = [place, model["name"], r["engine"], str(r["depth"]), *speeds, share]
            cells.append(record["date"][:10])
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(rows) + "</table>"
