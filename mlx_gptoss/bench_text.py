"""Records of measurements as text: a table for people, CSV, and the difference of two records."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_gptoss.bench import METRICS, VERSION, Record
from mlx_gptoss.errors import BenchmarkError

LABELS = {"prefill_tok_per_s": "prefill", "decode_tok_per_s": "decode", "ttft_s": "first token"}
SIGMAS = 2.0  # two means differ when they are further apart than this many standard errors


def read_record(path: Path) -> Record:
    """A record that `bench` saved.

    Raises:
        BenchmarkError: the file is missing, no JSON, or of another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BenchmarkError(f"{path}: expected the JSON of `bench --save`: {error}") from None
    found = record.get("version") if isinstance(record, dict) else None
    if found != VERSION:
        raise BenchmarkError(
            f"{path}: expected a record of version {VERSION}, got {found!r}; measure again"
        )
    return record


def as_markdown(record: Mapping[str, Any]) -> str:
    """Where it was measured, and a table of medians with standard deviations."""
    lines = [
        *_head(record),
        "",
        "| engine | depth | prefill tok/s | decode tok/s | first token s |",
    ]
    lines[-1] += " of limit | peak GB |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for r in record["results"]:
        cells = [f"{r[m]['median']:.4g} ± {r[m]['sd']:.2g}" for m in METRICS]
        share = "" if r["share_of_limit"] is None else f"{100 * r['share_of_limit']:.0f} %"
        peak = f"{r['peak_memory_bytes'] / 1e9:.2f}"
        lines.append(f"| {' | '.join([r['engine'], str(r['depth']), *cells, share, peak])} |")
    for ratio in record["ratios"]:
        lines.append(
            f"\ndepth {ratio['depth']}: ours over mlx-lm: "
            f"prefill {ratio['prefill_tok_per_s']:.2f}, decode {ratio['decode_tok_per_s']:.2f}"
        )
    return "\n".join(lines)


def _head(record: Mapping[str, Any]) -> Iterator[str]:
    machine, model, software = (record[key] for key in ("machine", "model", "software"))
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GB" if machine["memory_bytes"] else "memory ?"
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    yield f"**{model['name']}** ({model['nbytes'] / 1e9:.2f} GB, dense {model['dense'] or '?'})"
    yield (
        f"{machine['cpu'] or machine['architecture']}{cores}, {memory}, {machine['system']} "
        f"{machine['os_version']}, {machine['power_source'] or 'power ?'}, "
        f"heat {machine['thermal_pressure'] or '?'}"
    )
    yield ", ".join(f"{name} {value}" for name, value in software.items())
    settings, cold = record["settings"], record["cold"]
    yield (
        f"{settings['repeats']} runs of {settings['answer']} tokens after a warm-up: median ± "
        f"standard deviation; cold: load {cold['load_s']:.2f} s, first token {cold['ttft_s']:.2f} s"
    )


def as_csv(record: Mapping[str, Any]) -> str:
    """One line for each engine and depth."""
    out = io.StringIO()
    names = [f"{metric}_{part}" for metric in METRICS for part in ("median", "mean", "sd")]
    writer = csv.writer(out, lineterminator="\n")
    rest = ["limit_tok_per_s", "peak_memory_bytes"]
    writer.writerow(["model", "chip", "engine", "depth", *names, *rest])
    for r in record["results"]:
        values = [r[metric][part] for metric in METRICS for part in ("median", "mean", "sd")]
        place = [record["model"]["name"], record["machine"]["cpu"], r["engine"], r["depth"]]
        writer.writerow([*place, *values, *(r[name] for name in rest)])
    return out.getvalue().rstrip("\n")


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Record]:
    """Where two records measured the same: the ratio of medians, and whether it means anything.

    Raises:
        BenchmarkError: they have nothing in common.
    """
    old = {(r["engine"], r["depth"]): r for r in before["results"]}
    found: list[Record] = []
    for new in after["results"]:
        if (first := old.get((new["engine"], new["depth"]))) is None:
            continue
        for metric in METRICS:
            a, b = first[metric], new[metric]
            error = (a["sd"] ** 2 / len(a["runs"]) + b["sd"] ** 2 / len(b["runs"])) ** 0.5
            found.append(
                {
                    "engine": new["engine"],
                    "depth": new["depth"],
                    "metric": metric,
                    "before": a["median"],
                    "after": b["median"],
                    "ratio": b["median"] / a["median"],
                    "significant": abs(b["mean"] - a["mean"]) > SIGMAS * error,
                }
            )
    if not found:
        raise BenchmarkError("the records have no engine and depth in common: nothing to compare")
    return found


def difference_text(rows: list[Record]) -> str:
    """A table of `difference`."""
    lines = [
        "| engine | depth | what | before | after | ratio | |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for r in rows:
        meaning = "differs" if r["significant"] else "within the spread"
        lines.append(
            f"| {r['engine']} | {r['depth']} | {LABELS[r['metric']]} | {r['before']:.4g} | "
            f"{r['after']:.4g} | {r['ratio']:.3f} | {meaning} |"
        )
    return "\n".join(lines)
