"""Our kernels with a user's own weights: the cases of `kernels.cases`, their weights replaced.

Of the experts and of the vocabulary only the first few take part: each is treated alike.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_gptoss.decode import Decoder
from mlx_gptoss.kernels.agreement import MOST_EXCESS, compare
from mlx_gptoss.kernels.cases import Dense, Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet, check_sizes, sizes_of, unread
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model, dense_forms
from mlx_gptoss.sampling import SamplingParams


def kernel_fault(stem: str, model: Model, *, layer: int) -> str:
    """Run a kernel and its definition with the weights of one layer.

    Args:
        stem: of the kernel.
        model: whose weights are used.
        layer: which layer's.

    Returns:
        What is wrong with the kernel here; empty if it agrees.
    """
    kernel = KERNELS[stem]
    make = Inputs(check_sizes(sizes_of(model.config)), dtype=model.dtype, dense=_dense(model))
    arguments = kernel.case(make)
    arguments |= {
        k: v for k, v in _weights(stem, model, layer, make.sizes).items() if k in arguments
    }
    try:
        worst = max(compare(kernel, arguments))
    except Exception as error:  # whatever Metal's compiler or driver says is the finding
        return f"failed: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return "" if worst <= MOST_EXCESS else f"differs by {worst:.3g} times its tolerance"


def with_all_kernels(model: Model) -> Model:
    """The same weights with every kernel that reads them, whatever was chosen for the model."""
    other = copy(model)
    other.kernels = KernelSet.of(unread(dense_forms(model)))
    return other


def decoded(model: Model, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """What the compiled step chooses greedily after a prompt.

    Args:
        model: with kernels.
        prompt: ids, at least 2; fed in two chunks, but for the last.
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


def _dense(model: Model) -> Dense:
    bits = model.unembedding.bits
    return "plain" if bits is None else "q8" if bits == 8 else "q4"


def _weights(stem: str, model: Model, layer: int, sizes: Sizes) -> dict[str, Any]:
    """The model's weights under the names of the kernels' arguments."""
    attention, moe = model.layers[layer]
    norms = {"norm_qkv_rope": attention.norm, "route": moe.norm}
    table = model.embedding
    whole = table if isinstance(table, Matrix) else table.rows(mx.arange(sizes.vocab))
    outer = {"embed": whole, "unembed": model.unembedding}
    return {
        "matrix": first(outer[stem], sizes.vocab) if stem in outer else attention.out,
        "norm": norms.get(stem, model.norm),
        "projections": (attention.q, attention.k, attention.v),
        "sinks": attention.sinks,
        "router": first(moe.router, sizes.experts),
        "gate": first(moe.gate, sizes.experts),
        "up": first(moe.up, sizes.experts),
        "down": first(moe.down, sizes.experts),
    }


def first(matrix: Matrix, count: int) -> Matrix:
    """The first rows of a matrix, or the first experts of a stack."""

    def cut(array: mx.array | None) -> mx.array | None:
        return None if array is None else mx.contiguous(array[:count])

    return replace(
        matrix,
        weight=mx.contiguous(matrix.weight[:count]),
        bias=cut(matrix.bias),
        scales=cut(matrix.scales),
        offsets=cut(matrix.offsets),
    )
