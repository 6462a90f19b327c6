"""Prefill speed: our model and mlx-lm's, in one process, on the same arrays, in turn.

    python benchmarks/prefill.py [--rounds 5] [--prompt 128] [--write]

What is timed: from an empty cache to the logits after the prompt's last token, each side as its own
generator does it: mlx-lm feeds all tokens but the last, then the last; we feed the prompt once and
unembed its last row. Both leave out the last layer's experts for the tokens before.
"""

import argparse
from collections.abc import Callable
from typing import Any

import machine
import mini
import mlx.core as mx

Prefill = Callable[[mx.array], None]


def our_prefill(arrays: dict[str, mx.array], dtype: str) -> Prefill:
    """A closure that computes the logits after a prompt (1, T) with our model."""
    model = mini.ours(arrays, dtype)

    def run(prompt: mx.array) -> None:
        cache = model.make_cache()
        logits = model.next_logits(prompt, cache)
        mx.eval(logits, cache.arrays)

    return run


def peer_prefill(arrays: dict[str, mx.array]) -> Prefill:
    """The same with mlx-lm's model, in the two steps of its `generate_step`."""
    from mlx_lm.models.cache import make_prompt_cache

    model = mini.peer(arrays)

    def run(prompt: mx.array) -> None:
        cache = make_prompt_cache(model)
        model(prompt[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])
        logits = model(prompt[:, -1:], cache=cache)[:, -1]
        mx.eval(logits)

    return run


def compare(dtype: str, *, rounds: int, prompt_length: int) -> dict[str, Any]:
    """Time both sides in turn; report seconds per token, their ratio, and peak memory."""
    arrays = mini.weights(getattr(mx, dtype))
    prompt = mx.random.randint(0, mini.CONFIG.vocab_size, (1, prompt_length))
    prefills = {"mlx_lm": peer_prefill(arrays), "mlx_gptoss": our_prefill(arrays, dtype)}
    peaks = dict.fromkeys(prefills, 0)

    def measured(name: str) -> Callable[[], None]:
        def run() -> None:
            mx.reset_peak_memory()
            prefills[name](prompt)
            peaks[name] = max(peaks[name], mx.get_peak_memory())

        return run

    for prefill in prefills.values():
        prefill(prompt[:, :4])  # warm-up; a whole prompt takes mlx-lm a minute
    timers = machine.interleaved({name: measured(name) for name in prefills}, rounds=rounds)
    return machine.report_pair(f"{dtype:8}", timers, per=prompt_length, peaks=peaks)


def main() -> None:
    """Parse the options, print the static card, run, print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], action="append", help="default: both"
    )
    machine.add_write(parser, "prefill_mini")
    options = parser.parse_args()
    for part, size in mini.card().items():
        print(f"a bfloat16 token reads {size / 1e6:8.1f} MB of {part}")
    results = {
        dtype: compare(dtype, rounds=options.rounds, prompt_length=options.prompt)
        for dtype in options.dtype or ("bfloat16", "float32")
    }
    found = {"card_bytes": mini.card(), "results": results}
    machine.finish(machine.record("prefill", found), keep=options.write)


if __name__ == "__main__":
    main()
