"""Decode speed: our model and mlx-lm's, in one process, on the same arrays, in turn.

    python benchmarks/decode.py [--rounds 7] [--tokens 2] [--prompt 64] [--write]

What is timed: feeding one token and waiting for the best next one, with a prompt in the cache; no
sampling beyond that, no text. Peak memory is that of a prompt and the tokens after it, weights
included; that of the tokens alone is recorded beside it. `mini` has the published widths and 2 of
24 layers, so that its unembedding weighs twelve times as much as in the real model: a ratio here is
not the real model's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import machine
import mini
import mlx.core as mx

from mlx_gptoss.model import Model

Step = Callable[[], mx.array]


def our_step(model: Model, prompt: mx.array) -> Step:
    """A closure that decodes one token with our model, its prompt already fed."""
    cache = model.make_cache()
    token = model.next_logits(prompt, cache).argmax(-1, keepdims=True)

    def step() -> mx.array:
        nonlocal token
        token = model.next_logits(token, cache).argmax(-1, keepdims=True)
        mx.eval(token)
        return token

    mx.eval(token)
    return step


def peer_step(model: Any, prompt: mx.array) -> Step:
    """The same with mlx-lm's model and caches."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(prompt[:, :-1], cache=cache)
    mx.eval([layer.state for layer in cache])
    token = model(prompt[:, -1:], cache=cache)[:, -1].argmax(-1, keepdims=True)

    def step() -> mx.array:
        nonlocal token
        token = model(token, cache=cache)[:, -1].argmax(-1, keepdims=True)
        mx.eval(token)
        return token

    mx.eval(token)
    return step


def compare(dtype: str, *, rounds: int, tokens: int, prompt_length: int) -> dict[str, Any]:
    """Time both sides in turn; report seconds per token, their ratio, and peak memory."""
    arrays = mini.weights(getattr(mx, dtype))
    prompt = mx.random.randint(0, mini.CONFIG.vocab_size, (1, prompt_length))
    starts = {
        "mlx_lm": partial(peer_step, mini.peer(arrays), prompt),
        "mlx_gptoss": partial(our_step, mini.ours(arrays, dtype), prompt),
    }
    peaks = {name: peak_bytes(partial(answer, start, tokens)) for name, start in starts.items()}
    sides = {name: partial(decode, start(), tokens) for name, start in starts.items()}
    decoding = {name: peak_bytes(side) for name, side in sides.items()}
    timers = machine.interleaved(sides, rounds=rounds)
    result = machine.report_pair(f"{dtype:8}", timers, per=tokens, peaks=peaks)
    above = decoding["mlx_gptoss"] - decoding["mlx_lm"]
    print(f"{dtype:8} decoding alone, our peak is {above:+,} bytes from mlx-lm's")
    return {**result, "decode_peak_bytes": decoding}


def answer(start: Callable[[], Step], tokens: int) -> None:
    """Feed the prompt, then decode a few tokens."""
    decode(start(), tokens)


def decode(step: Step, tokens: int) -> None:
    """Decode a few tokens."""
    for _ in range(tokens):
        step()


def peak_bytes(run: Callable[[], None]) -> int:
    """MLX's highest allocation during a run, everything alive before it included."""
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()


def main() -> None:
    """Parse the options, print the static card, run, print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--tokens", type=int, default=2, help="tokens in a measurement")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], action="append", help="default: both"
    )
    machine.add_write(parser, "decode_mini")
    options = parser.parse_args()
    for part, size in mini.card().items():
        print(f"a bfloat16 token reads {size / 1e6:8.1f} MB of {part}")
    results = {
        dtype: compare(
            dtype, rounds=options.rounds, tokens=options.tokens, prompt_length=options.prompt
        )
        for dtype in options.dtype or ("bfloat16", "float32")
    }
    found = {"card_bytes": mini.card(), "results": results}
    machine.finish(machine.record("decode", found), keep=options.write)


if __name__ == "__main__":
    main()
