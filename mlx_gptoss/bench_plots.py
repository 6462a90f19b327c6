"""Plots as SVG text: bars by chip, and curves and measured points over depth.

Colours and fonts are the page's; here are only places. Classes: `limit`, `guess` (a prediction),
`real` (ours) and `peer`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, LEFT, RIGHT, ROW = 860, 160, 80, 24  # of bars
AXIS, LABELS, TOP, FOOT = 50, 130, 20, 30  # beside curves, in units of the drawing
GAP = 15  # between labels

Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Something measured: its place, how far another measurement may lie from it, and words.

    `label` stands beside the dot, `title` shows when it is pointed at.
    """

    depth: float
    speed: float
    spread: float | None
    kind: str
    label: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A speed over depth: a limit, or a prediction, which is labelled at its end."""

    name: str
    kind: str
    values: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One chip: a bar to the limit, a tick at the prediction, dots where somebody measured."""

    name: str
    detail: str
    limit: float
    guess: float
    points: Sequence[Point] = field(default_factory=tuple)


def bars(rows: Sequence[Bar], *, label: str) -> str:
    """A horizontal bar for each chip."""
    scale = (WIDTH - LEFT - RIGHT) / max(row.limit for row in rows)
    parts = []
    for n, row in enumerate(rows):
        y, guess, limit = n * ROW, LEFT + row.guess * scale, row.limit * scale
        parts += [
            f'<text x="0" y="{y + 16}">{row.name} <tspan class="dim">{row.detail}</tspan></text>',
            f'<rect class="limit" x="{LEFT}" y="{y + 3}" width="{limit:.1f}" height="18"/>',
            f'<line class="guess" x1="{guess:.1f}" x2="{guess:.1f}" y1="{y + 2}" y2="{y + 22}"/>',
            f'<text class="dim" x="{LEFT + limit + 6:.1f}" y="{y + 16}">'
            f'<tspan class="number">{row.guess:.0f}</tspan> of {row.limit:.0f}</text>',
        ]
        parts += [_dot(point, LEFT + point.speed * scale, y + 12) for point in row.points]
    return _svg(WIDTH, len(rows) * ROW, parts, label)


def over_depth(
    curves: Sequence[Curve], points: Sequence[Point], *, label: str, width: int = WIDTH
) -> str:
    """Speeds over depth, both logarithmic: at least one curve or point."""
    height = 300
    places = [(p.depth, p.speed) for p in points]
    places += [place for curve in curves for place in curve.values]
    depths, ticks = _octaves([d for d, _ in places]), _ticks([speed for _, speed in places])
    right = width - (LABELS if any(curve.name for curve in curves) else 30)
    x = _log_scale(depths[0], depths[-1], AXIS, right)
    y = _log_scale(ticks[0], ticks[-1], height - FOOT, TOP)
    parts = [*_axes(x, y, depths, ticks, right=right, height=height)]
    for curve in curves:
        line = " ".join(f"{x(depth):.1f},{y(speed):.1f}" for depth, speed in curve.values)
        parts.append(f'<polyline class="{curve.kind} line" points="{line}"/>')
    ends = {curve.name: y(curve.values[-1][1]) for curve in curves if curve.name}
    for name, place in _apart(ends):
        parts.append(f'<text x="{right + 6}" y="{place + 4:.1f}">{name}</text>')
    for p in points:
        at, level = x(p.depth), y(p.speed)
        if p.spread is not None:
            low, high = y(p.speed - p.spread), y(p.speed + p.spread)
            ends_of_bar = f'x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
            parts.append(f'<line class="{p.kind} spread" {ends_of_bar}/>')
        parts.append(_dot(p, at, level))
        parts.append(f'<text class="dim" x="{at + 8:.1f}" y="{level + 4:.1f}">{p.label}</text>')
    return _svg(width, height, parts, label)


def _log_scale(low: float, high: float, start: float, end: float) -> Scale:
    """From values to places; what lies outside is drawn at the edge."""

    def place(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return start + share * (end - start)

    return place


def _octaves(depths: Sequence[float]) -> list[int]:
    """Powers of two around all depths, two at least."""
    low, high = math.floor(math.log2(min(depths))), math.ceil(math.log2(max(depths)))
    return [2**n for n in range(low, max(high, low + 1) + 1)]


def _ticks(speeds: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around all speeds, two at least."""
    low, high = min(speeds), max(speeds)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [base * 10.0**power for power in powers for base in (1, 2, 5)]
    first = max(n for n, step in enumerate(steps) if step <= low)
    last = min((n for n, step in enumerate(steps) if step >= high), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def _axes(
    x: Scale, y: Scale, depths: Sequence[int], ticks: Sequence[float], *, right: int, height: int
) -> Iterator[str]:
    for speed in ticks:
        at = y(speed)
        yield f'<line class="axis" x1="{AXIS}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="dim" x="{AXIS - 8}" y="{at + 4:.1f}" text-anchor="end">{speed:g}'
        yield "</text>"
    for depth in depths:
        name = f"{depth // 1024}k" if depth >= 1024 else str(depth)
        yield f'<text class="dim" x="{x(depth):.1f}" y="{height - 8}" text-anchor="middle">{name}'
        yield "</text>"


def _apart(places: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Labels moved apart from the lowest upwards, so that none covers another."""
    last = math.inf
    for name, place in sorted(places.items(), key=lambda item: -item[1]):
        last = min(place, last - GAP)
        yield name, last


def _dot(point: Point, x: float, y: float) -> str:
    title = f"<title>{escape(point.title)}</title>"
    return f'<circle class="{point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
