"""One measured generation, by this package's engine or by mlx-lm on the same arrays."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlx_gptoss.engine import Engine
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams

OURS, PEER = "mlx-gptoss", "mlx-lm"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation: speeds in tokens/s, time to first token in seconds."""

    prefill_tok_per_s: float
    decode_tok_per_s: float
    ttft_s: float
    peak_memory_bytes: int


class Runner(Protocol):
    """An engine that can be measured."""

    name: str

    def run(self, prompt: Sequence[int], answer: int) -> Run:
        """Generate `answer` tokens greedily after a prompt, from an empty cache."""
        ...


class OurRunner:
    """This package's engine.

    Args:
        model: the model.
    """

    name = OURS

    def __init__(self, model: Model) -> None:
        self._engine = Engine(model)

    def run(self, prompt: Sequence[int], answer: int) -> Run:
        """See `Runner`."""
        mx.reset_peak_memory()
        greedy = SamplingParams(temperature=0)
        with self._engine.generate(prompt, sampling=greedy, max_tokens=answer) as generation:
            for _ in generation:
                pass
        stats = generation.stats
        assert stats.ttft_s and stats.prefill_tok_per_s and stats.decode_tok_per_s
        return Run(
            prefill_tok_per_s=stats.prefill_tok_per_s,
            decode_tok_per_s=stats.decode_tok_per_s,
            ttft_s=stats.ttft_s,
            peak_memory_bytes=stats.peak_memory_bytes,
        )


class PeerRunner:
    """mlx-lm on the same arrays: nothing is held twice, and the weights are surely the same.

    Args:
        folder: that the model was loaded from.
        model: ours.
    """

    name = PEER

    def __init__(self, folder: Path, model: Model) -> None:
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder, lazy=True)
        self._model.load_weights(list(named_arrays(model).items()))
        self._generate = generate_step

    def run(self, prompt: Sequence[int], answer: int) -> Run:
        """See `Runner`."""
        mx.reset_peak_memory()
        began, times = time.perf_counter(), []
        for _ in self._generate(mx.array(list(prompt)), self._model, max_tokens=answer):
            times.append(time.perf_counter())
        ttft_s = times[0] - began
        return Run(
            prefill_tok_per_s=len(prompt) / ttft_s,
            decode_tok_per_s=(len(times) - 1) / (times[-1] - times[0]),
            ttft_s=ttft_s,
            peak_memory_bytes=mx.get_peak_memory(),
        )


def named_arrays(model: Model) -> dict[str, mx.array]:
    """The weights of a model under the names of `checkpoint.expected_tensors`."""
    arrays = {"model.norm.weight": model.norm}
    arrays |= _matrix("model.embed_tokens", model.embedding)
    arrays |= _matrix("lm_head", model.unembedding)
    for n, (attention, moe) in enumerate(model.layers):
        layer = f"model.layers.{n}"
        arrays[f"{layer}.input_layernorm.weight"] = attention.norm
        arrays[f"{layer}.post_attention_layernorm.weight"] = moe.norm
        arrays[f"{layer}.self_attn.sinks"] = attention.sinks
        for name, matrix in (
            ("self_attn.q_proj", attention.q),
            ("self_attn.k_proj", attention.k),
            ("self_attn.v_proj", attention.v),
            ("self_attn.o_proj", attention.out),
            ("mlp.router", moe.router),
            ("mlp.experts.gate_proj", moe.gate),
            ("mlp.experts.up_proj", moe.up),
            ("mlp.experts.down_proj", moe.down),
        ):
            arrays |= _matrix(f"{layer}.{name}", matrix)
    return arrays


def _matrix(module: str, matrix: Matrix) -> Iterator[tuple[str, mx.array]]:
    parts = {
        "weight": matrix.weight,
        "bias": matrix.bias,
        "scales": matrix.scales,
        "biases": matrix.offsets,
    }
    return ((f"{module}.{name}", array) for name, array in parts.items() if array is not None)
