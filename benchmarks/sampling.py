"""The time to choose a token from the logits of the whole vocabulary: ours beside mlx-lm's.

    python benchmarks/sampling.py [--rounds 9] [--tokens 5] [--write]

Both get the same (1, 201088) logits in bfloat16, as the unembedding gives them, and do all they do
for a token outside the compiled step: ours leaves out the ids that are no text and draws by the
seed, mlx-lm makes log-probabilities first. On a Mac our kernels sample inside the step; this runs
without them. The last line is one JSON object.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import machine
import mlx.core as mx

from mlx_gptoss.sampling import SamplingParams, SamplingRows, sample
from mlx_gptoss.vocabulary import load_vocabulary

SPREAD = 4.0  # standard deviation of the logits: a few dozen tokens share most of the mass
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top-k 40": {"top_k": 40},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 40, top-p 0.9, min-p 0.05": {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
}


def our_choice(logits: mx.array, asked: dict[str, Any], tokens: int) -> Callable[[], None]:
    """A closure that chooses so many tokens, each at its place in the sequence."""
    rows = SamplingRows.pack([SamplingParams(**asked, seed=7)])
    allowed = mx.array(load_vocabulary().sampleable)
    places = itertools.count()

    def choose() -> None:
        for _ in range(tokens):
            position = mx.array([next(places)], mx.int32)
            mx.eval(sample(logits, position, rows=rows, allowed=allowed))

    return choose


def peer_choice(logits: mx.array, asked: dict[str, Any], tokens: int) -> Callable[[], None]:
    """The same as mlx-lm's `generate_step` does it."""
    from mlx_lm.sample_utils import make_sampler

    temperature = asked.get("temperature", 1.0)
    sampler = make_sampler(
        temperature,
        top_p=asked.get("top_p", 0.0),
        min_p=asked.get("min_p", 0.0),
        top_k=asked.get("top_k", 0),
    )

    def choose() -> None:
        for _ in range(tokens):
            mx.eval(sampler(logits - mx.logsumexp(logits, keepdims=True)))

    return choose


def main() -> None:
    """Parse the options, time every setting, print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side")
    parser.add_argument("--tokens", type=int, default=5, help="tokens in a measurement")
    machine.add_write(parser, "sampling")
    options = parser.parse_args()
    size = load_vocabulary().n_vocab
    logits = (SPREAD * mx.random.normal((1, size), key=mx.random.key(3))).astype(mx.bfloat16)
    mx.eval(logits)
    results: dict[str, Any] = {}
    for name, asked in SETTINGS.items():
        sides = {
            "mlx-lm": peer_choice(logits, asked, options.tokens),
            "mlx-gptoss": our_choice(logits, asked, options.tokens),
        }
        for choose in sides.values():
            choose()
        timers = machine.interleaved(sides, rounds=options.rounds)
        results[name] = machine.report_pair(name, timers, per=options.tokens)
    found = {"vocabulary": size, "results": results}
    machine.finish(machine.record("sampling", found), keep=options.write)


if __name__ == "__main__":
    main()
