"""Whether two runs of `mlx-gptoss bench` agree within the spread that they state.

    python benchmarks/reproduce.py demo --tries 10 [--write] --depths 64 --answer 16

A try runs the command twice, each in a process of its own, and compares the records as `bench diff`
does; options that are not ours are the command's. The last line is one JSON object: for each speed
how many tries agree, and each try's ratio beside the spread that the first run stated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from mlx_gptoss.bench_text import CASE, difference  # noqa: E402
from mlx_gptoss.cli.bench import bench  # noqa: E402


def measure(model: str, options: list[str]) -> dict[str, Any]:
    """The record of a fresh process."""
    command = [sys.executable, "-m", "mlx_gptoss", "bench", model, "--format", "json", "--quiet"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main() -> None:
    """Run the tries and count those that agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tries", type=int, default=10, help="pairs of runs")
    machine.add_write(parser, "reproduce")
    asked, options = parser.parse_known_args()
    try:
        bench.commands["run"].make_context("bench", [asked.model, *options])
    except click.UsageError as error:
        parser.error(error.format_message())
    speeds: dict[str, list[dict[str, Any]]] = {}
    for n in range(asked.tries):
        first, second = measure(asked.model, options), measure(asked.model, options)
        stated = {tuple(r[key] for key in CASE): r for r in first["results"]}
        for row in difference(first, second):
            case = tuple(row[key] for key in CASE)
            metric = stated[case][row["metric"]]
            speeds.setdefault(" ".join(map(str, (*case, row["metric"]))), []).append(
                {
                    "ratio": round(row["ratio"], 4),
                    "spread": round(metric["spread"] / metric["median"], 4),
                    "agree": not row["significant"],
                    "load": [r["meanwhile"]["load_average"] for r in (first, second)],
                }
            )
        last = {name: tries[-1] for name, tries in speeds.items()}
        for name, one in last.items():
            verdict = "agree" if one["agree"] else "DIFFER"
            print(
                f"{n + 1:>3} {name:42} x {one['ratio']:<7} ± {one['spread']:<7} {verdict}",
                flush=True,
            )
    agree = {name: sum(one["agree"] for one in tries) for name, tries in speeds.items()}
    for name, count in agree.items():
        print(f"{name}: {count} of {asked.tries} agree")
    found = {"model": Path(asked.model).name, "options": options, "agree": agree, "tries": speeds}
    machine.finish(machine.record("reproduce", found), keep=asked.write)


if __name__ == "__main__":
    main()
