"""What a token of a turn held to a schema costs the host, and that it costs the device nothing.

    python benchmarks/guided.py [--schemas 40] [--rounds 60] [--write]

Masks: CPU time of llguidance from a token to the mask of the next, while answers to random schemas
are drawn from the masks. Such a turn takes its step in two parts, so that the layers run meanwhile;
the peers' devices wait for the mask. The step: kernels of the whole one and of its parts, counted
in the traced graph of the 20b, and the host's CPU time to replay them as in decode_card.py. The
last line is one JSON object.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import machine
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from json_schemas import random_schema  # noqa: E402

from benchmarks.decode_card import MODELS, shell_model  # noqa: E402
from benchmarks.graph import stand_in_kernels  # noqa: E402
from mlx_gptoss.decode import Decoder  # noqa: E402
from mlx_gptoss.dispatches import count_traced, step_arguments  # noqa: E402
from mlx_gptoss.harmony import ResponseFormat  # noqa: E402
from mlx_gptoss.kernels.selection import KernelSet, all_kernels  # noqa: E402
from mlx_gptoss.rules import TurnRules  # noqa: E402
from mlx_gptoss.structured import Guide  # noqa: E402
from mlx_gptoss.vocabulary import Special, load_vocabulary  # noqa: E402

HEAD = "<|channel|>analysis<|message|>A pet, I think.<|end|><|start|>assistant<|channel|>final"
MOST = 100  # drawn tokens of an answer


def mask_times(seed: int) -> list[float]:
    """CPU milliseconds of each mask of one turn."""
    answers = ResponseFormat(name="thing", schema=random_schema(seed))
    guide = Guide(TurnRules(answers=answers, calls={}, must_call=False))
    rng, bits, times = np.random.default_rng(seed), guide.allowed(), []
    given = iter(load_vocabulary().encoding.encode(HEAD, allowed_special="all"))
    for _ in range(MOST):
        ids = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        token = next(given, None) or int(ids[rng.integers(ids.size)])
        if token == Special.RETURN:
            break
        began = time.thread_time()
        guide.accept(token)
        bits = guide.allowed()
        times.append(1e3 * (time.thread_time() - began))
    return times


def masks(schemas: int) -> dict[str, float]:
    """Quantiles over all turns."""
    times = [t for seed in range(schemas) for t in mask_times(seed)]
    names = {"median_ms": 0.5, "p99_ms": 0.99, "highest_ms": 1.0}
    found = {name: round(float(np.quantile(times, share)), 4) for name, share in names.items()}
    return {"count": len(times), **found}


class Parts:
    """The step of the 20b with one row, q8 dense weights and arrays that are never computed."""

    def __init__(self, kernels: KernelSet):
        config = MODELS["20b"]
        allowed = np.ones(config.vocab_size)
        decoder = Decoder(shell_model(config, "q8"), kernels=kernels, allowed=allowed)
        given = step_arguments(decoder, rows=1, capacity=8192)
        frozen, append, token, control, sampling, mask, weights = given
        x = mx.zeros((1, config.hidden_size), mx.bfloat16)
        ends = {name: weights[name] for name in ("norm", "unembedding")}
        step = decoder.step
        self.whole = partial(step, filtered=False), given
        self.layers = step.layers, (frozen, append, token, control, weights)
        self.choice = partial(step.choose, filtered=False), (x, control, sampling, mask, ends)


def kernels_of(function: Callable[..., Any], given: Sequence[Any]) -> int:
    """Kernels that a function launches."""
    flat: Any = tree_flatten(given)

    def call(*arrays: mx.array) -> list[mx.array]:
        names = (name for name, _ in flat)
        made: Any = tree_flatten(function(*tree_unflatten(list(zip(names, arrays, strict=True)))))
        return [array for _, array in made]

    return count_traced(call, [array for _, array in flat]).kernels


def replays(rounds: int) -> dict[str, machine.Spread]:
    """CPU milliseconds to replay the compiled step, whole and in two parts, in turn."""
    parts = Parts(stand_in_kernels())
    whole, layers, choose = (mx.compile(f) for f, _ in (parts.whole, parts.layers, parts.choice))

    def in_two() -> None:
        x, _ = layers(*parts.layers[1])
        choose(x, *parts.choice[1][1:])

    sides = {"whole": lambda: whole(*parts.whole[1]), "in_two_parts": in_two}
    for run in sides.values():
        run()
    timers = machine.interleaved(sides, rounds=rounds)
    return {n: machine.Spread.of([1e3 * s for s in t.cpu_s]) for n, t in timers.items()}


def main() -> None:
    """Measure, print, and keep the record if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schemas", type=int, default=40, help="how many turns")
    parser.add_argument("--rounds", type=int, default=60, help="replays of each form")
    machine.add_write(parser, "guided")
    asked = parser.parse_args()
    parts = Parts(all_kernels())
    forms = {"whole": parts.whole, "layers": parts.layers, "choice": parts.choice}
    results = {
        "masks": masks(asked.schemas),
        "kernels": {name: kernels_of(*form) for name, form in forms.items()},
        "host_replay_cpu_ms": replays(asked.rounds),
    }
    print("masks", results["masks"])
    print("kernels of a token", results["kernels"])
    for name, spread in results["host_replay_cpu_ms"].items():
        print(f"host's replay, {name:12} {spread.line('ms')}")
    machine.finish(machine.record("guided", results), keep=asked.write)


if __name__ == "__main__":
    main()
