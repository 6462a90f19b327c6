"""Several turns at once: tokens per second of all of them over those of one, as an engine runs it.

    python benchmarks/batch.py [--model demo] [--turns 1 --turns 4] [--rounds 5] [--write]

What is timed: rounds in which every turn gets one token, sampled at temperature 1, its prompt fed
before. A ratio of n would mean that n turns take no longer than one; 1, that they might as well
take turns. `mini` has the published widths and 2 layers, so its unembedding weighs more than in
the real model; the ratio here is of this machine and its MLX, and says nothing of Metal.
"""

import argparse
from collections.abc import Callable
from typing import Any

import machine
import mini
import mlx.core as mx

from mlx_gptoss.engine import Engine
from mlx_gptoss.library import find_model
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.sampling import SamplingParams

TURNS = (1, 2, 4, 8)


def model_of(name: str) -> Model:
    """The demo in bfloat16, or `mini` with bfloat16 dense weights."""
    if name == "demo":
        return load_model(find_model("demo"))
    model = mini.ours(mini.weights(mx.bfloat16), "bfloat16")
    mx.eval(model.arrays)
    return model


def rounds_of(engine: Engine, count: int, *, prompt: int, tokens: int) -> Callable[[], None]:
    """A closure that gives each of `count` turns so many tokens, their prompts already fed."""
    size = engine.model.config.vocab_size
    turns = [
        engine.generate(
            [(7 * place + 31 * n) % size for n in range(prompt)],
            sampling=SamplingParams(seed=place),
        )
        for place in range(count)
    ]

    def several() -> None:
        for _ in range(tokens):
            engine.launch(turns)
            for turn in turns:
                next(turn)
        mx.synchronize()  # the step ahead is of this measurement, not of the next one

    several()
    return several


def measure(name: str, *, turns: list[int], rounds: int, prompt: int, tokens: int) -> Any:
    """Time the batches in turn; report tokens per second and their ratio to one turn's."""
    engine = Engine(model_of(name))
    sides = {str(n): rounds_of(engine, n, prompt=prompt, tokens=tokens) for n in turns}
    timers = machine.interleaved(sides, rounds=rounds)
    result: dict[str, Any] = {}
    for clock in ("wall_s", "cpu_s"):
        one = getattr(timers["1"], clock)
        for n in turns:
            each = getattr(timers[str(n)], clock)
            speed = machine.Spread.of([n * tokens / seconds for seconds in each])
            gain = machine.ratios([n * seconds for seconds in one], each)
            print(f"{name:5} {n:2} turns {clock:6} {speed.line('tok/s')}, {gain.line('x')} of one")
            result.setdefault(str(n), {})[clock] = {"tok_per_s": speed, "over_one": gain}
    return result


def main() -> None:
    """Parse the options, run, print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["demo", "mini"], action="append", help="default: both")
    parser.add_argument(
        "--turns", type=int, action="append", help="at once; default: 1, 2, 4 and 8"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--prompt", type=int, default=16, help="tokens before them")
    parser.add_argument("--tokens", type=int, default=2, help="tokens of each turn in one")
    machine.add_write(parser, "batch")
    options = parser.parse_args()
    turns = sorted({1, *(options.turns or TURNS)})
    results = {
        name: measure(
            name,
            turns=turns,
            rounds=options.rounds,
            prompt=options.prompt,
            tokens=options.tokens,
        )
        for name in options.model or ("demo", "mini")
    }
    found = {"turns": turns, "results": results}
    machine.finish(machine.record("batch", found), keep=options.write)


if __name__ == "__main__":
    main()
