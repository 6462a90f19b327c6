"""Records of measurements as text: a table for people, CSV, and the difference of two records."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_gptoss.bench import BENCHMARK, METRICS, VERSION, Record
from mlx_gptoss.errors import BenchmarkError

CASE = ("engine", "depth", "batch")
TITLES = [*CASE, "prefill tok/s", "decode tok/s", "first token s", "of limit", "kernels", "peak GB"]
RATIOS = ["depth", "batch", "prefill", "decode"]
LABELS = {"prefill_tok_per_s": "prefill", "decode_tok_per_s": "decode", "ttft_s": "first token"}


def read_record(path: Path) -> Record:
    """A record that `bench` saved.

    Raises:
        BenchmarkError: the file is missing, no JSON, of another version, or not whole.
    """
    record = _read_json(path)
    found = record.get("version") if isinstance(record, dict) else None
    if found != VERSION:
        raise BenchmarkError(
            f"{path}: expected a record of version {VERSION}, got {found!r}; measure again"
        )
    try:
        machine_line(record)
        unlike(record, record)
        for result in record["results"]:
            table_cells(result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{path}: a field is missing or wrong: {error}; expected what `bench --save` writes; "
            "measure again"
        ) from None
    return record


def records_of(folder: Path) -> list[Record]:
    """Every record of a folder, which may hold other programs' results too.

    Raises:
        BenchmarkError: see `read_record`; there is no such folder.
    """
    if not folder.is_dir():
        raise BenchmarkError(
            f"{folder}: no such folder here; name records, or make one with --save"
        )
    found = {path: _read_json(path) for path in sorted(folder.glob("*.json"))}
    ours = (p for p, r in found.items() if isinstance(r, dict) and r.get("benchmark") == BENCHMARK)
    return [read_record(path) for path in ours]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BenchmarkError(f"{path}: expected the JSON of `bench --save`: {error}") from None


def as_markdown(record: Mapping[str, Any]) -> str:
    """Where it was measured, and a table of medians with their spreads."""
    lines = [*_head(record), "", _row(TITLES), "|---" + 8 * "|---:" + "|"]
    lines += [_row(table_cells(result)) for result in record["results"]]
    if record["ratios"]:
        lines += [
            "",
            "Ours over mlx-lm's, round by round:",
            "",
            _row(RATIOS),
            "|---:|---:|---:|---:|",
        ]
    for ratio in record["ratios"]:
        speeds = [with_spread(ratio[metric]) for metric in METRICS[:2]]
        lines.append(_row([str(ratio["depth"]), str(ratio["batch"]), *speeds]))
    return "\n".join(lines)


def table_cells(result: Mapping[str, Any]) -> list[str]:
    """One result under `TITLES`."""
    share, step = result["share_of_limit"], result["dispatches"]
    return [
        *(str(result[key]) for key in CASE),
        *(with_spread(result[metric]) for metric in METRICS),
        "" if share is None else f"{100 * share:.0f} %",
        str(step["per_step"]) if step else "",
        f"{result['peak_memory_bytes'] / 1e9:.2f}",
    ]


def with_spread(metric: Mapping[str, Any]) -> str:
    """`12.34 ± 0.5`; a single run has no spread."""
    median, spread = metric["median"], metric["spread"]
    return f"{median:.4g}" + ("" if spread is None else f" ± {float(f'{spread:.2g}'):g}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(record: Mapping[str, Any]) -> Iterator[str]:
    model, settings, cold = record["model"], record["settings"], record["cold"]
    size = f"{model['nbytes'] / 1e9:.2f} GB, dense {model['dense'] or '?'}"
    yield f"**{model['name']}** ({size}{embedding_in_file(record)})"
    yield machine_line(record)
    yield ", ".join(f"{name} {value}" for name, value in record["software"].items())
    yield (
        f"{settings['repeats']} runs of {settings['answer']} tokens after a warm-up, in turn: "
        "median ± how far two runs may lie apart, 19 times in 20"
    )
    yield (
        f"cold: load {cold['load_s']:.2f} s, first token {cold['ttft_s']:.2f} s; "
        "batch: tok/s of all rows; kernels: launched by a decode step, counted in its graph"
    )


def embedding_in_file(record: Mapping[str, Any]) -> str:
    """What tells a record from that of the same model with all of it in memory."""
    return ", embedding in its file" if record["settings"].get("embedding") == "file" else ""


def machine_line(record: Mapping[str, Any]) -> str:
    """Chip, cores, memory, system, power, heat, pressure and load, as far as they are known."""
    machine, meanwhile = record["machine"], record["meanwhile"]
    cores = [f"{machine[f'{kind}_cores'] or '?'} {kind.upper()} cores" for kind in ("cpu", "gpu")]
    parts = [machine["cpu"] or machine["architecture"], cores[0]]
    parts += [cores[1]] if machine["gpu_cores"] else []
    for name, size in (("", "memory_bytes"), ("wired limit ", "wired_limit_bytes")):
        parts += [f"{name}{machine[size] / 2**30:.0f} GB"] if machine[size] else []
    heat = [machine["thermal_pressure"], meanwhile["thermal_pressure_after"]]
    pressure = [level for level in meanwhile.get("memory_pressure", ()) if level]
    parts += [
        f"{machine['system']} {machine['os_version']}",
        machine["power_source"] or "power ?",
        *(["low-power mode"] if machine["low_power_mode"] else []),
        "heat " + " to ".join(dict.fromkeys(level or "?" for level in heat)),
        *(["memory pressure " + " to ".join(dict.fromkeys(pressure))] if pressure else []),
        "load " + " to ".join(f"{load:.1f}" for load in meanwhile["load_average"]),
    ]
    return ", ".join(parts)


def as_csv(record: Mapping[str, Any]) -> str:
    """One line for each engine, depth and batch."""
    out = io.StringIO()
    parts = ("median", "mean", "sd", "spread")
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{metric}_{part}" for metric in METRICS for part in parts]
    rest = ["limit_tok_per_s", "peak_memory_bytes"]
    writer.writerow(["model", "chip", *CASE, *columns, *rest, "dispatches"])
    for r in record["results"]:
        values = [r[metric][part] for metric in METRICS for part in parts]
        place = [record["model"]["name"], record["machine"]["cpu"], *(r[key] for key in CASE)]
        step = r["dispatches"] and r["dispatches"]["per_step"]
        writer.writerow([*place, *values, *(r[name] for name in rest), step])
    return out.getvalue().rstrip("\n")


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Record]:
    """Where two records measured the same: the ratio of medians, and whether it means anything.

    Medians that are further apart than the root mean square of the two stated spreads differ.

    Raises:
        BenchmarkError: they have nothing in common.
    """
    old = {tuple(r[key] for key in CASE): r for r in before["results"]}
    found: list[Record] = []
    for new in after["results"]:
        case = {key: new[key] for key in CASE}
        if (first := old.get(tuple(case.values()))) is None:
            continue
        for metric in METRICS:
            a, b = first[metric], new[metric]
            spreads = [m["spread"] for m in (a, b) if m["spread"] is not None]
            allowed = math.hypot(*spreads) / len(spreads) ** 0.5 if spreads else math.inf
            found.append(
                {
                    **case,
                    "metric": metric,
                    "before": a["median"],
                    "after": b["median"],
                    "ratio": b["median"] / a["median"],
                    "significant": abs(b["median"] - a["median"]) > allowed,
                }
            )
    if not found:
        raise BenchmarkError(
            "the records have no engine, depth and batch in common: nothing to compare"
        )
    return found


def unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What else differs between two records, and may be why their speeds do."""
    one, other = _circumstances(before), _circumstances(after)
    return [
        f"{what}: {text} and {other[what][1]}"
        for what, (key, text) in one.items()
        if key != other[what][0]
    ]


def _circumstances(record: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Weights, machine and length of the answers: each as it is compared, and as it is shown."""
    model, machine = record["model"], record["machine"]
    weights = model["digest"] or model["nbytes"]
    cores, memory = machine["gpu_cores"], (machine["memory_bytes"] or 0) / 2**30
    answer, place = (record["settings"].get(name) for name in ("answer", "embedding"))
    return {
        "weights": (weights, f"{model['name']} ({str(weights)[:8]})"),
        "chip": (machine["cpu"], machine["cpu"] or machine["architecture"]),
        "GPU cores": (cores, str(cores or "?")),
        "memory": (memory, f"{memory:.0f} GB"),
        "tokens of an answer": (answer, str(answer)),
        "place of the embedding": (place or "memory", place or "memory"),
    }


def difference_text(rows: list[Record]) -> str:
    """A table of `difference`."""
    titles = "engine|depth|batch|what|before|after|ratio|"
    lines = [_row(titles.split("|")), "|---|---:|---:|---|---:|---:|---:|---|"]
    for r in rows:
        meaning = "differs" if r["significant"] else "within the spread"
        cells = [r["engine"], str(r["depth"]), str(r["batch"]), LABELS[r["metric"]]]
        numbers = [f"{r['before']:.4g}", f"{r['after']:.4g}", f"{r['ratio']:.3f}"]
        lines.append(_row([*cells, *numbers, meaning]))
    return "\n".join(lines)
