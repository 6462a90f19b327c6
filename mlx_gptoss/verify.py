"""Is this copy of a model, on this machine, the model that was published? A check for each doubt.

    files      every byte is what the converter wrote
    constants  the numbers of config.json that no gpt-oss varies are the published ones
    rotation   cosines and sines on this device against float64
    layers     two layers at a time in float32: a prompt at once, in pieces, token by token
    products   matrix products on this device, with these weights, against float64
    kernels    our kernels, with these weights, against their definitions
    steps      the whole model by our kernels, where they run: a prompt in chunks, decoded tokens
    routes     the whole model as it is used: a prompt at once, and token by token
    answer     a stored answer of the same weights, token by token

A check compares two ways to the same numbers; thresholds stand beside each with their reason.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint import Checkpoint, open_checkpoint
from mlx_gptoss.config import GPT_OSS_20B, ModelConfig
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.fitting import require
from mlx_gptoss.kernel_faults import decoded, kernel_fault, with_all_kernels
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.matrix import Matrix, expert_linear, linear
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.model_info import check_hashes
from mlx_gptoss.plan import BF16, F32, MemoryPlan, scratch_here
from mlx_gptoss.rope import RopeTable, inverse_frequencies
from mlx_gptoss.routes import (
    BEYOND,
    TAIL,
    difference,
    hidden_by_pieces,
    layers_alone,
    route_differences,
    sample_prompt,
)
from mlx_gptoss.table import EmbeddingPlace
from mlx_gptoss.transcripts import Transcript, agreement, score, stored_transcript, weights_digest
from mlx_gptoss.unpack import bias_rows, dense_rows, numbers

Progress = Callable[[str, int, int], None]

# Numbers that every published gpt-oss and its fine-tunes share: another value is a damaged config.
CONSTANTS = ("rope_theta", "rope", "swiglu_limit", "swiglu_alpha", "rms_norm_eps", "sliding_window")

ROWS = 256  # of a matrix that are computed in float64
STEPS = 16  # decoded by the kernels
STEPS_GAP = 0.1  # nats; right kernels differ by 0.02 on random weights, whose logits spread widely
TOKENS = (1, 5, 80)  # a matrix-vector product, a narrow and a tiled matrix product
# A product may differ by its rounding to bfloat16, and by the rounding of its sum.
ROUNDING = 2**-7
SUM_ROUNDING = 0.01  # of the root mean square of the output; a wrong kernel differs by about 1

LAYER_ERROR = 1e-4  # right routes differ by 1e-6 to 1e-5, a single lost key by 1e-3 or more
ROTATION_ERROR = 2e-6  # of a product of two float32 cosines
# Two routes round to bfloat16 in other places. Measured between right routes: see benchmarks/LOG.md
MEAN_KL = 0.02  # nats
TOP1 = 0.75
ANSWER_TOP1 = 0.95  # the same rounding, over tokens of which few are near-ties
ANSWER_GAP = 0.05  # nats


class Outcome(StrEnum):
    """How a check ended."""

    PASSED = "ok"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: a plain sentence, and the numbers behind it."""

    name: str
    outcome: Outcome
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)


def verify(
    folder: Path,
    *,
    limit_bytes: int | None = None,
    embedding: EmbeddingPlace = "memory",
    progress: Progress | None = None,
) -> Iterator[Check]:
    """Check a converted folder, cheapest doubt first; stops where nothing further can be said.

    Args:
        folder: ours or mlx-lm's.
        limit_bytes: what the GPU may use; None where it cannot be read.
        embedding: where the table stays, as `load_model` takes it.
        progress: called with (phase, done, total).

    Yields:
        Each check as it ends.

    Raises:
        MachineError: the checks need more memory than there is; nothing was loaded.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except GptOssError as error:
        yield Check(name="files", outcome=Outcome.FAILED, detail=str(error))
        return
    require(
        planned_bytes(checkpoint, embedding=embedding),
        limit_bytes=limit_bytes,
        what=f"verifying a model of {checkpoint.nbytes / 1e9:.2f} GB",
        instead="`mlx-gptoss info --hashes` checks its files alone"
        + (", and --embedding file saves the memory of the table" * (embedding == "memory")),
    )
    yield (files := _files(checkpoint, progress))
    if files.outcome is Outcome.FAILED:
        return
    yield _constants(checkpoint.config)
    yield _rotation(checkpoint.config)
    yield _layers(checkpoint, progress)
    model = load_model(folder, kernels="off", embedding=embedding)
    yield _products(model)
    yield (kernels := _kernels(model))
    if kernels.outcome is Outcome.PASSED:
        yield _steps(model)
    yield _routes(model)
    yield _answer(checkpoint, model)


def planned_bytes(checkpoint: Checkpoint, *, embedding: EmbeddingPlace) -> int:
    """The peak of all checks: the weights, and the larger of two.

    The products have an output of the unembedding for each of their tokens; the routes have a
    prompt at once, and logits of its last positions in the model's type and in float32.
    """
    config = checkpoint.config
    prompt = 2 * config.sliding_window + BEYOND
    plan = MemoryPlan(
        config=config,
        packing=checkpoint.quantization,
        context=prompt + STEPS,
        chunk=prompt,
        embedding=embedding,
        scratch=scratch_here(),
    )
    products = plan.resident_bytes + max(TOKENS) * config.vocab_size * F32
    return max(products, plan.total_bytes + TAIL * config.vocab_size * (BF16 + F32))


def _passed(name: str, good: bool, detail: str, **numbers: float) -> Check:
    outcome = Outcome.PASSED if good else Outcome.FAILED
    return Check(name=name, outcome=outcome, detail=detail, numbers=numbers)


def _files(checkpoint: Checkpoint, progress: Progress | None) -> Check:
    if checkpoint.manifest is None:
        detail = "another tool wrote this folder: there are no hashes to hold its bytes to"
        return Check(name="files", outcome=Outcome.SKIPPED, detail=detail)
    try:
        names = check_hashes(checkpoint, progress=progress)
    except GptOssError as error:
        return Check(name="files", outcome=Outcome.FAILED, detail=str(error))
    return _passed("files", True, f"{len(names)} files, every byte as converted")


def _constants(config: ModelConfig) -> Check:
    wrong = [
        f"{name} is {getattr(config, name)}, published models have {getattr(GPT_OSS_20B, name)}"
        for name in CONSTANTS
        if getattr(config, name) != getattr(GPT_OSS_20B, name)
    ]
    good = "rotation, window, norm and activation are those of the published models"
    return _passed("constants", not wrong, "config.json: " + ("; ".join(wrong) or good))


def _rotation(config: ModelConfig) -> Check:
    """Positions near the window, in the middle and at the end of the context."""
    last = config.max_position_embeddings - 1
    positions = np.unique(np.clip([0, 1, 127, 128, 129, last // 2, last - 1, last], 0, last))
    angles = positions[:, None] * inverse_frequencies(config)
    found = RopeTable.of(config).at(mx.array(positions, mx.int32)[None])
    pairs = zip(found, (np.cos(angles), np.sin(angles)), strict=True)
    worst = max(float(np.abs(numbers(got)[0, 0] - want).max()) for got, want in pairs)
    detail = f"cosines and sines up to position {last}: largest difference {worst:.1e}"
    return _passed("rotation", worst <= ROTATION_ERROR, detail, max_difference=worst)


def _products(model: Model) -> Check:
    """Every kind of matrix in the first and in the last layer."""
    c, worst, where = model.config, 0.0, ""
    last = c.num_hidden_layers - 1
    for n in sorted({0, last}):
        attention, moe = model.layers[n]
        for name in ("q", "k", "v", "out"):
            found = product_excess(getattr(attention, name), model.dtype)
            worst, where = max((worst, where), (found, f"layer {n}, {name}"))
        for name in ("gate", "up", "down"):
            for expert in (0, c.num_local_experts - 1):
                found = product_excess(getattr(moe, name), model.dtype, expert=expert)
                worst, where = max((worst, where), (found, f"layer {n}, {name} of {expert}"))
        found = product_excess(moe.router, model.dtype)
        worst, where = max((worst, where), (found, f"layer {n}, router"))
    found = product_excess(model.unembedding, model.dtype)
    worst, where = max((worst, where), (found, "unembedding"))
    good = worst <= 1
    detail = (
        f"of {', '.join(map(str, TOKENS))} tokens with these weights: largest difference from "
        f"float64 is {worst:.2g} of what rounding explains ({where})"
    )
    if not good:
        detail += "; this device computes wrongly: update macOS and mlx, then verify again"
    return _passed("products", good, detail, worst_over_tolerance=worst)


def product_excess(matrix: Matrix, dtype: mx.Dtype, *, expert: int | None = None) -> float:
    """Largest difference of a product from float64, over what rounding explains.

    Args:
        matrix: one, or a stack of experts.
        dtype: of the activations.
        expert: which of a stack.

    Returns:
        At most 1 if the device computes rightly; infinite if it returns no number.
    """
    count = matrix.weight.shape[-2]
    rows = np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(np.int64))
    weight = dense_rows(matrix, rows, expert)  # (R, columns)
    bias = bias_rows(matrix, rows, expert)
    worst = 0.0
    for tokens in TOKENS:
        noise = np.random.default_rng(tokens).standard_normal((tokens, weight.shape[1]))
        x = mx.array(noise.astype(np.float32)).astype(dtype)
        got = numbers(_product(x, matrix, expert)[:, mx.array(rows)])
        want = numbers(x) @ weight.T + bias
        tolerance = ROUNDING * np.abs(want) + SUM_ROUNDING * np.sqrt((want**2).mean())
        ratio = np.abs(got - want) / np.maximum(tolerance, 1e-30)
        worst = max(worst, float(np.where(np.isfinite(ratio), ratio, np.inf).max()))
    return worst


def _kernels(model: Model) -> Check:
    """Every kernel with weights of the first two layers, a window and a full one."""
    if not mx.metal.is_available():
        detail = "this machine has no Metal device: MLX's operations run in their place"
        return Check(name="kernels", outcome=Outcome.SKIPPED, detail=detail)
    stems = with_all_kernels(model).kernels.used
    wrong = {
        f"{stem} in layer {n}": reason
        for n in range(min(2, model.config.num_hidden_layers))
        for stem in stems
        if (reason := kernel_fault(stem, model, layer=n))
    }
    detail = "; ".join(f"{place} {reason}" for place, reason in wrong.items())
    detail = detail or f"{len(stems)} kernels agree with their definitions"
    if unused := sorted(KERNELS.keys() - set(stems)):
        detail += f"; {', '.join(unused)} cannot read this model's weights"
    return _passed("kernels", not wrong, detail, wrong=len(wrong))


def _steps(model: Model) -> Check:
    """The whole model by its kernels, past the window: a prompt in chunks, then compiled steps."""
    window, ours = model.config.sliding_window, with_all_kernels(model)
    prompt = sample_prompt(model.config, 2 * window + BEYOND)
    routes = (hidden_by_pieces(model, prompt, ()), hidden_by_pieces(ours, prompt, (window + 1,)))
    d = difference(*(numbers(model.unembed(hidden)[0]) for hidden in routes))
    tokens, logprobs = decoded(ours, prompt, STEPS)
    fed = Transcript(prompt=tuple(prompt), tokens=tuple(tokens), logprobs=tuple(logprobs))
    top1, gap = agreement(fed, score(model, fed))
    detail = (
        f"{len(prompt)} tokens by the kernels in chunks: KL {d.mean_kl:.2g} nats, same choice "
        f"{100 * d.top1:.0f} %, largest difference {d.largest:.2g}; {STEPS} decoded by them: same "
        f"choice {100 * top1:.0f} %, mean difference of log-probabilities {gap:.2g}"
    )
    good = d.mean_kl <= MEAN_KL and min(d.top1, top1) >= TOP1 and gap <= STEPS_GAP
    found = {"mean_kl": d.mean_kl, "top1": d.top1, "max_difference": d.largest}
    return _passed("steps", good, detail, **found, decoded_top1=top1, decoded_gap=gap)


def _product(x: mx.array, matrix: Matrix, expert: int | None) -> mx.array:
    if expert is None:
        return linear(x, matrix)
    experts = mx.full((x.shape[0],), expert, dtype=mx.uint32)
    return expert_linear(x[:, None], matrix, experts, grouped=x.shape[0] > 1)[:, 0]


def _layers(checkpoint: Checkpoint, progress: Progress | None) -> Check:
    """Two layers at a time in float32, where right routes agree to rounding and wrong ones do not.

    Two keep what matters, a sliding and a full layer, and need little memory.
    """
    count, worst, where = checkpoint.config.num_hidden_layers, 0.0, ""
    for first in range(0, count, 2):
        if progress:
            progress("comparing routes, layers", first, count)
        part = layers_alone(checkpoint, range(first, min(first + 2, count)))
        for name, found in route_differences(part):
            worst, where = max((worst, where), (found, f"layers {first}-, {name}"))
    if progress:
        progress("comparing routes, layers", count, count)
    good = worst <= LAYER_ERROR
    detail = (
        f"{count} layers by twos in float32: a prompt at once, in chunks around the window and "
        f"token by token differ by {worst:.1e} of the values" + (f" ({where})" if not good else "")
    )
    return _passed("layers", good, detail, worst=worst)


def _routes(model: Model) -> Check:
    """The whole model as it is used: a prompt at once, and its last tokens one by one."""
    prompt = sample_prompt(model.config, 2 * model.config.sliding_window + BEYOND)
    pieces = (len(prompt) - TAIL, *[1] * (TAIL - 1))
    routes = [hidden_by_pieces(model, prompt, some) for some in ((), pieces)]
    d = difference(*(numbers(model.unembed(hidden)[0]) for hidden in routes))
    detail = (
        f"{len(prompt)} tokens at once, or the last {TAIL} one by one: KL {d.mean_kl:.2g} nats, "
        f"same choice {100 * d.top1:.0f} %, largest difference {d.largest:.2g}"
    )
    good = d.mean_kl <= MEAN_KL and d.top1 >= TOP1
    found = {"mean_kl": d.mean_kl, "top1": d.top1, "max_difference": d.largest}
    return _passed("routes", good, detail, **found)


def _answer(checkpoint: Checkpoint, model: Model) -> Check:
    """A stored answer: near-ties may fall either way, so nearly all choices must be the same."""
    stored = stored_transcript(weights_digest(checkpoint))
    if stored is None:
        detail = "no answer is stored for these weights"
        return Check(name="answer", outcome=Outcome.SKIPPED, detail=detail)
    top1, gap = agreement(stored, score(model, stored))
    detail = (
        f"{len(stored.tokens)} stored tokens: same choice at {100 * top1:.0f} %, mean difference "
        f"of log-probabilities {gap:.2g}"
    )
    good = top1 >= ANSWER_TOP1 and gap <= ANSWER_GAP
    return _passed("answer", good, detail, top1=top1, mean_gap=gap)
