"""The same prompt by several routes: at once, in chunks around the window, token by token.

Right routes differ by rounding alone. Seen over two layers in float32 that is a millionth of the
values, so that a single lost key shows; over a whole model in bfloat16 it is what users get.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint import Checkpoint
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.model import Model
from mlx_gptoss.unpack import Float64, numbers

BEYOND = 37  # tokens of a prompt past two windows
TAIL = 24  # last positions, at which routes are compared
IDS = 256  # of the vocabulary, where only layers are looked at
ORDINARY = 199_998  # ids below are text; control tokens come after


def sample_prompt(config: ModelConfig, length: int) -> list[int]:
    """Token ids spread over the vocabulary, the same for every machine."""
    most = min(config.vocab_size, ORDINARY)
    return [(i * i * 7919 + i * 104_729 + 17) % most for i in range(length)]


def hidden_by_pieces(model: Model, prompt: Sequence[int], pieces: Sequence[int]) -> mx.array:
    """Hidden states of the last positions of a prompt that is fed in pieces.

    Args:
        model: the model.
        prompt: token ids.
        pieces: lengths of the first pieces; what remains is the last one.

    Returns:
        (1, TAIL, D) in the model's type.
    """
    cache, hidden, start = model.make_cache(), [], 0
    for end in (*np.cumsum(pieces, dtype=int).tolist(), len(prompt)):
        hidden.append(model.hidden(mx.array([list(prompt[start:end])], mx.int32), cache))
        mx.eval(hidden[-1], cache.arrays)
        start = end
    return mx.concatenate(hidden, axis=1)[:, -TAIL:]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two sets of logits are apart: nats, a share of positions, and logits."""

    mean_kl: float
    top1: float
    largest: float


def difference(want: Float64, got: Float64) -> Difference:
    """Compare logits, (N, V) each, position by position; no number anywhere is infinitely far."""
    if not np.isfinite(got).all():
        return Difference(mean_kl=float("inf"), top1=0.0, largest=float("inf"))

    def log_softmax(x: Float64) -> Float64:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(want), log_softmax(got)
    return Difference(
        mean_kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        top1=float((want.argmax(-1) == got.argmax(-1)).mean()),
        largest=float(np.abs(want - got).max()),
    )


def layers_alone(checkpoint: Checkpoint, layers: range) -> Model:
    """A float32 model of consecutive layers of a checkpoint, with a vocabulary of `IDS` ids."""
    c, weights, packing = checkpoint.config, {}, {}
    config = replace(
        c,
        num_hidden_layers=len(layers),
        layer_types=c.layer_types[layers.start : layers.stop],
        vocab_size=min(IDS, c.vocab_size),
    )
    places = {f"model.layers.{n}.": f"model.layers.{i}." for i, n in enumerate(layers)}

    def rename(name: str) -> str | None:
        layer = next((old for old in places if name.startswith(old)), None)
        if layer is None:
            return None if name.startswith("model.layers.") else name
        return places[layer] + name.removeprefix(layer)

    for name, array in checkpoint.load().items():
        if new := rename(name):
            outer = name.startswith(("model.embed_tokens", "lm_head"))
            weights[new] = array[: config.vocab_size] if outer else array
    for module, found in checkpoint.quantization.items():
        if new := rename(module + "."):
            packing[new.removesuffix(".")] = found
    return Model(config, weights, quantization=packing, dtype="float32")


def route_differences(model: Model) -> Iterator[tuple[str, float]]:
    """Hidden states by other routes against a prompt in one piece.

    Yields:
        The route, and the difference that nine of ten positions stay below, in units of the
        states' root mean square: one position may choose another expert by a hair.
    """
    window = model.config.sliding_window
    prompt = sample_prompt(model.config, 2 * window + BEYOND)
    whole = hidden_by_pieces(model, prompt, ())
    for name, pieces in {
        f"chunks of 1, {window - 1} and {window}": (1, window - 1, window),
        f"chunks of {window + 1}": (window + 1,),
        "token by token": (len(prompt) - TAIL, *[1] * (TAIL - 1)),
    }.items():
        gap = np.abs(numbers(hidden_by_pieces(model, prompt, pieces)) - numbers(whole)).max(-1)[0]
        found = float(np.quantile(gap, 0.9)) / float(np.sqrt((numbers(whole) ** 2).mean()))
        yield name, found if np.isfinite(found) else float("inf")
