"""Measure prefill and decode on this machine, with everything that makes a number comparable.

One run is one generation from an empty cache: prompts as long as the wanted depth, then answers.
So time to first token, prefill at that length, and decode at that depth come from the same run.
The first run of all is reported as cold. Then come rounds, in which every depth and batch is run
once by every engine: A B A B, so that a machine that heats up heats up for both, and so that the
runs of one depth lie minutes apart and their spread holds what the machine does meanwhile. The
first round warms up and is thrown away.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from mlx_gptoss.bench_record import model_facts, software
from mlx_gptoss.bench_runs import OURS, PEER, OurRunner, PeerRunner, Run, Runner, peer_bytes
from mlx_gptoss.checkpoint import Checkpoint, open_checkpoint
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.dispatches import Counted
from mlx_gptoss.errors import MachineError
from mlx_gptoss.fitting import require
from mlx_gptoss.library import kernel_record
from mlx_gptoss.machine import (
    Machine,
    read_memory_pressure,
    read_thermal_pressure,
)
from mlx_gptoss.model import load_model
from mlx_gptoss.plan import MemoryPlan, scratch_here
from mlx_gptoss.roofline import limit_tok_per_s
from mlx_gptoss.routes import sample_prompt
from mlx_gptoss.table import EmbeddingPlace

BENCHMARK, VERSION = "bench", 2  # of the record
METRICS = ("prefill_tok_per_s", "decode_tok_per_s", "ttft_s")
STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 1 to 9 degrees of freedom
ANSWER_WEIGHT = 10  # a decoded token takes about as long as so many of a prompt
Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """What one result is about: tokens before the answers, and rows at a time."""

    depth: int
    batch: int


def bench(
    name: str,
    folder: Path,
    *,
    machine: Machine,
    depths: Sequence[int],
    answer: int,
    repeats: int,
    batches: Sequence[int] = (1,),
    compare: bool = False,
    embedding: EmbeddingPlace = "memory",
    progress: Progress | None = None,
) -> Record:
    """Measure a model and return the record, ready for JSON.

    Args:
        name: of the model, for the record.
        folder: converted.
        machine: from `read_machine`.
        depths: lengths of the prompts, >= 1 each.
        answer: tokens decoded in each run, >= 2.
        repeats: rounds, after one that warms up.
        batches: rows at a time, >= 1 each; every one is measured at every depth.
        compare: measure mlx-lm too, which needs the embedding in memory.
        embedding: where the table stays, as `load_model` takes it.
        progress: called with (phase, done, in all).

    Raises:
        MachineError: a prompt with its answer is longer than the context, the rows are more than
            an engine takes, or they do not fit here.
    """
    checkpoint, load = open_checkpoint(folder), os.getloadavg()[0]
    cases = [Case(depth, batch) for depth, batch in product(depths, batches)]
    _admit(checkpoint, cases, answer, compare=compare, embedding=embedding, machine=machine)
    pressure, began = read_memory_pressure(), time.perf_counter()
    model = load_model(folder, embedding=embedding, kernel_record=kernel_record())
    load_s = time.perf_counter() - began
    made_with = software(model, compare=compare)  # the tree may move on while a long one runs
    runners: list[Runner] = [OurRunner(model)]
    if compare:
        runners.append(PeerRunner(folder, model))
    rounds = [cases[0], *(1 + repeats) * len(runners) * cases]
    meter = _Meter(checkpoint.config, rounds, answer=answer, progress=progress)
    cold = meter.run(runners[0], cases[0])
    runners[0].next_step()
    results = _measure(runners, cases, rounds=1 + repeats, meter=meter)
    _hold_against_limit(results, checkpoint, machine)
    return {
        "benchmark": BENCHMARK,
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "meanwhile": {
            "load_average": [load, os.getloadavg()[0]],
            "thermal_pressure_after": read_thermal_pressure(),
            "memory_pressure": [pressure, read_memory_pressure()],
        },
        "software": made_with,
        "model": model_facts(name, checkpoint),
        "settings": {
            "depths": list(depths),
            "batches": list(batches),
            "answer": answer,
            "repeats": repeats,
            "embedding": embedding,
        },
        "cold": {"load_s": load_s, **asdict(cold)},
        "results": results,
        "ratios": list(_ratios(results)) if compare else [],
    }


def _admit(
    checkpoint: Checkpoint,
    cases: Sequence[Case],
    answer: int,
    *,
    compare: bool,
    embedding: EmbeddingPlace,
    machine: Machine,
) -> None:
    """Refuse what the context or this machine cannot hold, before anything is loaded."""
    longest = checkpoint.config.max_position_embeddings - answer
    for case in cases:
        if case.depth > longest:
            raise MachineError(
                f"depth {case.depth}: expected at most {longest}, so that an answer of {answer} "
                f"tokens has room in the context of {longest + answer}; lower --depths or --answer"
            )
        plan = MemoryPlan(
            config=checkpoint.config,
            packing=checkpoint.quantization,
            context=case.depth + answer,
            batch=case.batch,
            embedding=embedding,
            scratch=scratch_here(),
        )
        _check_memory(plan, case, compare=compare, machine=machine)


def _check_memory(plan: MemoryPlan, case: Case, *, compare: bool, machine: Machine) -> None:
    """Refuse what this machine cannot hold beside the weights, of each engine by itself.

    Both share the weights, and neither holds anything of its last run while the other one runs.
    """
    sides = {OURS: (plan.total_bytes, "; or --embedding file" * (plan.embedding == "memory"))}
    if compare:
        sides[PEER] = (peer_bytes(plan), "; or leave out --compare")
    for engine, (needed, otherwise) in sides.items():
        require(
            needed,
            limit_bytes=machine.gpu_limit_bytes,
            what=f"{engine} at depth {case.depth} in batches of {case.batch}, with the weights,",
            instead=f"measure less: --depths, --batch{otherwise}",
        )


class _Meter:
    """Runs cases, and tells how much of all is done."""

    def __init__(
        self,
        config: ModelConfig,
        cases: Sequence[Case],
        *,
        answer: int,
        progress: Progress | None,
    ) -> None:
        self._config, self._answer, self._progress = config, answer, progress
        self._done, self._total = 0, sum(map(self._weight, cases))

    def run(self, runner: Runner, case: Case) -> Run:
        """One run; every row has a prompt of its own, and so its own experts."""
        rows = range(case.batch)
        prompts = [sample_prompt(self._config, case.depth + row)[row:] for row in rows]
        found = runner.run(prompts, self._answer, fed=self._tell)
        self._done += self._weight(case)
        self._tell(0)
        return found

    def _weight(self, case: Case) -> int:
        return case.batch * (case.depth + ANSWER_WEIGHT * self._answer)

    def _tell(self, fed: int) -> None:
        if self._progress:
            self._progress("measuring", self._done + fed, self._total)


def _measure(
    runners: Sequence[Runner], cases: Sequence[Case], *, rounds: int, meter: _Meter
) -> list[Record]:
    """Every case by every engine, round by round; the first round warms up.

    The step after each run is counted: that lets go of the run's caches too, which would else be in
    the next one's peak.
    """
    runs: dict[tuple[Case, str], list[Run]] = {}
    steps: dict[tuple[Case, str], Counted | None] = {}
    for turn, case, runner in product(range(rounds), cases, runners):
        found = meter.run(runner, case)
        steps[case, runner.name] = runner.next_step()
        if turn:
            runs.setdefault((case, runner.name), []).append(found)
    return [_result(engine, case, runs[case, engine], steps[case, engine]) for case, engine in runs]


def _result(engine: str, case: Case, runs: Sequence[Run], step: Counted | None) -> Record:
    result: Record = {"engine": engine, **asdict(case)}
    for metric in METRICS:
        result[metric] = summary([getattr(run, metric) for run in runs])
    result["peak_memory_bytes"] = max(run.peak_memory_bytes for run in runs)
    result["dispatches"] = step and {"per_step": step.kernels, "in_a_chain": step.depth}
    return result


def summary(values: Sequence[float]) -> Record:
    """Median, mean, standard deviation, and the spread that is stated.

    The spread says how far two runs may lie apart, 19 times in 20: Student's t times the standard
    deviation of a difference. Medians would lie closer if runs were independent, but a machine
    drifts from one minute to the next, and the runs of one record drift together. None for one run.
    """
    count = len(values)
    sd = statistics.stdev(values) if count > 1 else 0.0
    t = STUDENT_95[min(count - 1, len(STUDENT_95)) - 1]
    return {
        "median": statistics.median(values),
        "mean": statistics.mean(values),
        "sd": sd,
        "spread": t * 2**0.5 * sd if count > 1 else None,
        "runs": list(values),
    }


def _hold_against_limit(
    results: Sequence[Record], checkpoint: Checkpoint, machine: Machine
) -> None:
    """Add the chip's limit, where the chip is known, and the share of it that was reached."""
    for result in results:
        limit = machine.chip and limit_tok_per_s(
            checkpoint.config,
            checkpoint.quantization,
            machine.chip,
            depth=result["depth"],
            batch=result["batch"],
        )
        result["limit_tok_per_s"] = limit
        result["share_of_limit"] = limit and result["decode_tok_per_s"]["median"] / limit


def _ratios(results: Sequence[Record]) -> Iterator[Record]:
    """Ours over the peer's, round by round; above 1 we are faster.

    Both sides of a round share what the machine did meanwhile: ratios spread less than speeds.
    """
    engines = {(r["engine"], r["depth"], r["batch"]): r for r in results}
    for engine, depth, batch in engines:
        if engine == OURS:
            ours, peer = engines[OURS, depth, batch], engines[PEER, depth, batch]
            metrics = {}
            for metric in ("prefill_tok_per_s", "decode_tok_per_s"):
                pairs = zip(ours[metric]["runs"], peer[metric]["runs"], strict=True)
                metrics[metric] = summary([a / b for a, b in pairs])
            yield {"depth": depth, "batch": batch, **metrics}
