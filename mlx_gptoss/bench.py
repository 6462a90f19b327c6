"""Measure prefill and decode on this machine, with everything that makes a number comparable.

One run is one generation from an empty cache: a prompt as long as the wanted depth, then an answer.
So time to first token, prefill at that length, and decode at that depth come from the same run.
The first run of all is reported as cold; one more warms each depth up; then every engine runs in
turn, A B A B, so that a machine that heats up heats up for both.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gptoss._version import __version__
from mlx_gptoss.bench_runs import OURS, PEER, OurRunner, PeerRunner, Run, Runner
from mlx_gptoss.checkpoint import Checkpoint, open_checkpoint
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.library import kernel_record
from mlx_gptoss.machine import Machine
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.roofline import limit_tok_per_s
from mlx_gptoss.routes import sample_prompt
from mlx_gptoss.transcripts import weights_digest

VERSION = 1  # of the record
METRICS = ("prefill_tok_per_s", "decode_tok_per_s", "ttft_s")
Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


def bench(
    name: str,
    folder: Path,
    *,
    machine: Machine,
    depths: Sequence[int],
    answer: int,
    repeats: int,
    compare: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Measure a model and return the record, ready for JSON.

    Args:
        name: of the model, for the record.
        folder: converted.
        machine: from `read_machine`.
        depths: lengths of the prompts, >= 1 each.
        answer: tokens decoded in each run, >= 2.
        repeats: runs of each depth and engine, after one that warms up.
        compare: measure mlx-lm too.
        progress: called with (phase, runs done, runs in all).
    """
    checkpoint, began = open_checkpoint(folder), time.perf_counter()
    model = load_model(folder, kernel_record=kernel_record())
    load_s = time.perf_counter() - began
    runners: list[Runner] = [OurRunner(model)]
    cold = runners[0].run(sample_prompt(checkpoint.config, depths[0]), answer)
    if compare:
        runners.append(PeerRunner(folder, model))
    results, total = [], len(depths) * len(runners) * (repeats + 1)
    for depth in depths:
        prompt = sample_prompt(checkpoint.config, depth)
        runs: dict[str, list[Run]] = {runner.name: [] for runner in runners}
        for turn in range(repeats + 1):
            for runner in runners:
                found = runner.run(prompt, answer)
                if turn:  # the first of each depth compiles and allocates
                    runs[runner.name].append(found)
                if progress:
                    done = len(results) * (repeats + 1) + turn * len(runners)
                    progress("measuring", min(done, total - 1), total)
        results += [_result(name, depth, runs[name]) for name in runs]
    _hold_against_limit(results, checkpoint, machine)
    if progress:
        progress("measuring", total, total)
    return {
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "software": _software(model, compare),
        "model": _model(name, checkpoint),
        "settings": {"depths": list(depths), "answer": answer, "repeats": repeats},
        "cold": {"load_s": load_s, **asdict(cold)},
        "results": results,
        "ratios": list(_ratios(results)) if compare else [],
    }


def _result(engine: str, depth: int, runs: Sequence[Run]) -> Record:
    result: Record = {"engine": engine, "depth": depth}
    for metric in METRICS:
        values = [getattr(run, metric) for run in runs]
        result[metric] = {
            "median": statistics.median(values),
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "runs": values,
        }
    result["peak_memory_bytes"] = max(run.peak_memory_bytes for run in runs)
    return result


def _hold_against_limit(
    results: Sequence[Record], checkpoint: Checkpoint, machine: Machine
) -> None:
    """Add the chip's limit, where the chip is known, and the share of it that was reached."""
    for result in results:
        limit = machine.chip and limit_tok_per_s(
            checkpoint.config, checkpoint.quantization, machine.chip, depth=result["depth"]
        )
        result["limit_tok_per_s"] = limit
        result["share_of_limit"] = limit and result["decode_tok_per_s"]["median"] / limit


def _software(model: Model, compare: bool) -> Record:
    kernels = model.kernels
    found = {
        "mlx-gptoss": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "device": str(mx.default_device()),
        "kernels": f"{len(kernels.used)} of {len(kernels.functions)}",
        "kernels not used": "; ".join(sorted(set(kernels.fallbacks.values()))) or "none",
    }
    return found | ({"mlx-lm": version("mlx-lm")} if compare else {})


def _model(name: str, checkpoint: Checkpoint) -> Record:
    config: ModelConfig = checkpoint.config
    return {
        "name": checkpoint.folder.name if Path(name).is_dir() else name,  # no path is published
        "digest": weights_digest(checkpoint),
        "nbytes": checkpoint.nbytes,
        "dense": (checkpoint.manifest or {}).get("options", {}).get("dense"),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "experts": config.num_local_experts,
    }


def _ratios(results: Sequence[Record]) -> Iterator[Record]:
    """Ours over the peer's, of medians; above 1 we are faster."""
    by_place = {(r["engine"], r["depth"]): r for r in results}
    for depth in dict.fromkeys(r["depth"] for r in results):
        ours, peer = by_place[OURS, depth], by_place[PEER, depth]
        yield {
            "depth": depth,
            **{
                metric: ours[metric]["median"] / peer[metric]["median"]
                for metric in ("prefill_tok_per_s", "decode_tok_per_s")
            },
        }


def file_name(record: Mapping[str, Any]) -> str:
    """bench_<chip>_<memory>_<model>.json, as records are kept in benchmarks/results."""
    machine = record["machine"]
    chip = (machine["cpu"] or machine["architecture"]).replace("Apple ", "")
    memory = f"{round((machine['memory_bytes'] or 0) / 2**30)}G"
    model = Path(record["model"]["name"]).name
    text = "_".join(("bench", chip, memory, model)).lower()
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in text) + ".json"
