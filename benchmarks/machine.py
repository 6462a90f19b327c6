"""What every benchmark says about itself: the machine, the versions, medians and their spread.

record = machine.record("decode", results)
machine.finish(record)   # prints the record as the last line, one JSON object
machine.finish(record, keep=options.write)   # and keeps it, after `machine.add_write(parser, ...)`
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_gptoss.machine import read_machine

PACKAGES = ("mlx", "mlx-lm", "numpy", "tiktoken", "llguidance", "torch", "transformers")
GIB = 2**30
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one thing: median, extremes and how many, in one unit."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise at least one sample."""
        return cls(
            median=statistics.median(samples),
            low=min(samples),
            high=max(samples),
            count=len(samples),
        )

    def line(self, unit: str, scale: float = 1.0) -> str:
        """`123 ms (118..140, n=5)`, each number multiplied by `scale`."""
        median, low, high = (x * scale for x in (self.median, self.low, self.high))
        return f"{median:.4g} {unit} ({low:.4g}..{high:.4g}, n={self.count})"


def _commit() -> str | None:
    git = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


COMMIT = _commit()  # read at the start: the tree may move on while a long benchmark runs


def facts() -> dict[str, Any]:
    """Machine, system, versions and commit: what a figure means nothing without."""
    here, versions = read_machine(), {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": here.cpu,
        "cores": here.cpu_cores,
        "memory_gib": here.memory_bytes and round(here.memory_bytes / GIB, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": COMMIT,
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


class Timer:
    """Wall and CPU seconds of something that is run several times.

    CPU seconds (all threads of this process) say more where other processes share the cores.
    """

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def time(self, run: Callable[[], object]) -> None:
        """Run once, which must wait for its own results, and keep both times."""
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)


def interleaved(sides: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timer]:
    """Time several things in turn, A B A B, so that a slow minute of the machine hits all alike.

    Args:
        sides: what to time, warmed up; each call must wait for its own results.
        rounds: measurements of each.

    Returns:
        The times of each side, in order.
    """
    timers = {name: Timer() for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            timers[name].time(run)
    return timers


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster `fast` was, round by round."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


def report_pair(
    label: str,
    timers: Mapping[str, Timer],
    *,
    per: int,
    peaks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Print two sides' times and their ratio, the second side being ours, and return them.

    Args:
        label: of the lines.
        timers: the peer's, then ours.
        per: tokens in each measurement.
        peaks: bytes of each side, where memory was measured.

    Returns:
        Seconds per token, how many times faster ours is, and the peaks, for the record.
    """
    (_, peer), (name, ours) = timers.items()
    result: dict[str, Any] = {"peak_bytes": dict(peaks)} if peaks else {}
    for clock in ("wall_s", "cpu_s"):
        each = {n: Spread.of([s / per for s in getattr(t, clock)]) for n, t in timers.items()}
        speedup = ratios(getattr(peer, clock), getattr(ours, clock))
        for side, spread in each.items():
            print(f"{label} {side:11} {clock:6} {spread.line('ms/token', 1e3)}")
        print(f"{label} {name:11} {clock:6} {speedup.line('x')} as fast")
        result[clock] = {**each, "speedup": speedup}
    for side, peak in (peaks or {}).items():
        print(f"{label} {side:11} peak   {peak / GIB:.3f} GiB")
    return result


def record(benchmark: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark's results with the facts they belong to."""

    def plain(value: Any) -> Any:
        if isinstance(value, Spread):
            return {k: v if k == "count" else float(f"{v:.6g}") for k, v in asdict(value).items()}
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return value

    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"benchmark": benchmark, "command": command, "machine": facts(), **plain(results)}


def add_write(parser: argparse.ArgumentParser, stem: str) -> None:
    """The option `--write`, which names the file that `finish` keeps the record in, or None."""
    path = RESULTS / f"{stem}_{sys.platform}.json"
    shown = path.relative_to(RESULTS.parent.parent)
    parser.add_argument(
        "--write",
        action="store_const",
        const=path,
        help=f"keep the record in {shown}, over the one that was there",
    )


def finish(entry: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Print the record as one line of JSON, the last of standard output, and keep it if asked."""
    print(json.dumps(entry))
    if keep is not None:
        keep.write_text(json.dumps(entry, indent=1) + "\n")
