"""Our kernels with a user's own weights: each alone as a model launches it, and all in a step."""

from collections.abc import Sequence
from copy import copy
from functools import partial

import mlx.core as mx

from mlx_gptoss.decode import Decoder
from mlx_gptoss.kernels.inputs import Inputs
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet, disagreement, sizes_of, unread
from mlx_gptoss.layer_weights import weights_of_layer
from mlx_gptoss.model import Model, dense_forms
from mlx_gptoss.sampling import SamplingParams


def kernel_fault(stem: str, model: Model, *, layer: int) -> str:
    """Run a kernel and its definition with the weights of one layer, in every way a model does.

    Args:
        stem: of the kernel.
        model: whose weights are used.
        layer: which layer's.

    Returns:
        What is wrong with the kernel here; empty if it agrees.
    """
    weights = weights_of_layer(
        model.layers[layer],
        embedding=model.embedding,
        norm=model.norm,
        unembedding=model.unembedding,
    )
    source = partial(Inputs, dtype=model.dtype, weights=weights)
    reason = disagreement(KERNELS[stem], sizes_of(model.config), sources=[source])
    return reason.removeprefix("it ")


def with_all_kernels(model: Model) -> Model:
    """The same weights with every kernel that reads them, whatever was chosen for the model."""
    other = copy(model)
    other.kernels = KernelSet.of(unread(dense_forms(model)))
    return other


def decoded(model: Model, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """What the compiled step chooses greedily after a prompt.

    Args:
        model: with kernels.
        prompt: ids, at least 3; fed in two chunks, but for the last.
        count: of steps.

    Returns:
        Ids, and their log-probabilities.
    """
    cache, half = model.make_cache(), len(prompt) // 2
    for piece in (prompt[:half], prompt[half:-1]):
        model.hidden(mx.array([list(piece)], mx.int32), cache)
        mx.eval(cache.arrays)
    allowed = mx.ones((model.config.vocab_size,), mx.uint8)
    decoder = Decoder(model, kernels=model.kernels, allowed=allowed)
    greedy = SamplingParams(temperature=0, seed=0)
    decoding = decoder.start(cache, mx.array([prompt[-1]], mx.int32), sampling=[greedy])
    tokens, logprobs = [], []
    for _ in range(count):
        decoder.advance([decoding])
        decoding.keep()
        tokens.append(int(decoding.state.token))
        logprobs.append(float(decoding.state.rows.logprob))
    decoding.finish()
    return tokens, logprobs
