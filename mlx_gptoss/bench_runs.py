"""One measured generation of one or several rows, by this package or by mlx-lm on its arrays."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.decode import Decoder
from mlx_gptoss.dispatches import Counted, count_lazy, count_step
from mlx_gptoss.engine import Engine, Generation
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model
from mlx_gptoss.plan import F32, LOGIT_ARRAYS, MemoryPlan
from mlx_gptoss.sampling import SamplingParams

OURS, PEER = "mlx-gptoss", "mlx-lm"
PEER_CHUNK, PEER_STEP = 2048, 256  # tokens of a prompt it reads at once, by which its caches grow
Prompts = Sequence[Sequence[int]]  # one a row, all of one length
Fed = Callable[[int], None]  # told how many tokens of all prompts are read


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation: speeds in tokens/s of all rows together, time to first token in seconds."""

    prefill_tok_per_s: float
    decode_tok_per_s: float
    ttft_s: float
    peak_memory_bytes: int


class Runner(Protocol):
    """An engine that can be measured."""

    name: str

    def run(self, prompts: Prompts, answer: int, *, fed: Fed) -> Run:
        """Generate `answer` tokens greedily after each prompt, all rows at once, from nothing."""
        ...

    def next_step(self) -> Counted | None:
        """What one more decode step after the last run would launch; None if that is hidden.

        The runner then holds nothing of the run.
        """
        ...


def _timed(prompts: Prompts, times: Sequence[float], *, began: float) -> Run:
    """A run whose rows' tokens were there at `times`, step by step."""
    rows, ttft_s = len(prompts), times[0] - began
    return Run(
        prefill_tok_per_s=rows * len(prompts[0]) / ttft_s,
        decode_tok_per_s=rows * (len(times) - 1) / (times[-1] - times[0]),
        ttft_s=ttft_s,
        peak_memory_bytes=mx.get_peak_memory(),
    )


class OurRunner:
    """This package's engine, with its generations in step, as the runtime runs them.

    Args:
        model: the model.
    """

    name = OURS

    def __init__(self, model: Model) -> None:
        self._model, self._engine = model, Engine(model)
        self._caches: list[ModelCache] = []  # of the last run

    def run(self, prompts: Prompts, answer: int, *, fed: Fed) -> Run:
        """See `Runner`."""
        self._caches = []
        mx.reset_peak_memory()
        began = time.perf_counter()
        times = [time.perf_counter() for _ in self.tokens(prompts, answer, fed=fed)]
        return _timed(prompts, times, began=began)

    def tokens(self, prompts: Prompts, answer: int, *, fed: Fed) -> Iterator[list[int]]:
        """The next token of every row, step by step; the prompts are read one after the other."""
        read = 0
        generations: list[Generation] = []
        for prompt in prompts:
            generation = self._engine.generate(
                prompt,
                sampling=SamplingParams(temperature=0),
                max_tokens=answer,
                on_prefill=lambda done, _, before=read: fed(before + done),
            )
            while generation.feed():
                pass
            generations.append(generation)
            read += len(prompt)
        for _ in range(answer):
            self._engine.launch(generations)
            yield [next(generation) for generation in generations]
        self._caches = [generation.cache for generation in generations]

    def next_step(self) -> Counted:
        """See `Runner`."""
        caches, self._caches = self._caches, []
        if self._model.kernels.used:
            allowed = mx.ones((self._model.config.vocab_size,))
            decoder = Decoder(self._model, kernels=self._model.kernels, allowed=allowed)
            return count_step(decoder, rows=len(caches), capacity=caches[0].offset)
        logits = self._model.step_rows(mx.zeros((len(caches),), mx.int32), caches)
        return count_lazy(
            mx.argmax(logits, axis=-1), *(a for cache in caches for a in cache.arrays)
        )


class PeerRunner:
    """mlx-lm on the same arrays: nothing is held twice, and the weights are surely the same.

    Args:
        folder: that the model was loaded from.
        model: ours.
    """

    name = PEER

    def __init__(self, folder: Path, model: Model) -> None:
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder, lazy=True)
        self._model.load_weights(list(named_arrays(model).items()))
        self._cache: Any = None  # of the last run; its batches hide theirs

    def run(self, prompts: Prompts, answer: int, *, fed: Fed) -> Run:
        """See `Runner`."""
        self._cache = None
        mx.reset_peak_memory()
        began = time.perf_counter()
        one = len(prompts) == 1
        steps = self._row(prompts[0], answer, fed) if one else self._rows(prompts, answer, fed)
        times = [time.perf_counter() for _ in steps]
        return _timed(prompts, times, began=began)

    def next_step(self) -> Counted | None:
        """See `Runner`."""
        if self._cache is None:
            return None
        logits = self._model(mx.zeros((1, 1), mx.int32), cache=self._cache)[:, -1]
        self._cache = None
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return count_lazy(mx.argmax(logprobs, axis=-1), logprobs)

    def _row(self, prompt: Sequence[int], answer: int, fed: Fed) -> Iterator[Any]:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        self._cache = make_prompt_cache(self._model)
        return generate_step(
            mx.array(list(prompt)),
            self._model,
            max_tokens=answer,
            prompt_cache=self._cache,
            prompt_progress_callback=lambda done, _: fed(done),
        )

    def _rows(self, prompts: Prompts, answer: int, fed: Fed) -> Iterator[Any]:
        """Its own batches, all rows from the first chunk on."""
        from mlx_lm.generate import BatchGenerator

        rows = len(prompts)
        batch = BatchGenerator(
            self._model,
            max_tokens=answer,
            prefill_batch_size=rows,
            completion_batch_size=rows,
        )
        batch.insert([list(prompt) for prompt in prompts])
        try:
            while any(progress := batch.next()):
                reading, tokens = progress
                if reading:
                    fed(rows * reading[0].progress[0])
                if tokens:
                    yield tokens
        finally:
            batch.close()


def peer_bytes(plan: MemoryPlan) -> int:
    """The peak of mlx-lm on the weights of a plan, for its context and its rows.

    It reads the prompts of all rows at once, in chunks of 2,048 tokens, and its sliding layers keep
    a whole chunk meanwhile. The coefficients are those of mlx-lm 0.32.2 on MLX's CPU, by
    `mx.get_peak_memory`; there it holds the scores of a chunk, which MLX's attention on Metal does
    not.
    """
    c, rows = plan.config, plan.batch
    chunk = min(PEER_CHUNK, plan.context)
    tokens, pairs = rows * chunk, rows * chunk * c.num_experts_per_tok
    experts = pairs * (10.5 * c.hidden_size + 7.7 * c.intermediate_size)
    attention = 10 * tokens * c.num_attention_heads * c.head_dim
    ends = range(plan.context, 0, -PEER_CHUNK) if plan.scratch.full else ()
    scores = max((min(chunk, end) * end for end in ends), default=0)
    scores *= 6 * rows * c.num_attention_heads
    sliding = (c.num_hidden_layers - plan.full_layers) * (chunk + c.sliding_window)
    positions = (plan.full_layers + 1) * (plan.context + PEER_STEP) + sliding
    logits = rows * LOGIT_ARRAYS * F32 * c.vocab_size
    scratch = max(int(experts) + attention + scores, logits)
    return plan.resident_bytes + rows * positions * plan.row_bytes + scratch


def named_arrays(model: Model) -> dict[str, mx.array]:
    """The weights of a model under the names of `checkpoint.expected_tensors`, all in memory."""
    assert isinstance(model.embedding, Matrix)
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
