"""A decode step as one function of fixed shapes, compiled once, made of our kernels.

A custom kernel costs 30 to 50 microseconds of Python each time it is called, and a step has 159 of
them on the 20b; so the step is traced once by `mx.compile` and replayed. Nothing in it depends on
a value the host holds: position, base and slot are in a control array that the step itself
advances, the token is sampled on the device.

Keys and values: `frozen` segments are only read; the step returns new `append` segments of `ROWS`
rows, so MLX never copies more than those while a step is in flight. When they are full, `Decoding`
merges them into the cache. A step computed ahead is dropped by going on from the state before it.

A batch is any generations, each with its own cache: the weights are read once for all rows, and
each attends over its own frozen segments. The rows of a batch depend on nothing but themselves.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import ModelCache, Segment
from mlx_gptoss.config import FULL
from mlx_gptoss.decode_state import Decoding, StepArrays, joined
from mlx_gptoss.decode_weights import Weights, arrays_of, given, weights_of
from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.batches import groups_experts
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams, packed

CONTROL = 8  # columns: position, base, slot, seed low, seed high; 8 make MLX pass a device pointer
MOST_TRACES = 64  # of one compiled function, which keeps them all: one for each set of shapes


class Decoder:
    """The step of one model.

    Args:
        model: whose weights it reads; they are arguments of the compiled function, not constants,
            and should be evaluated: what is lazy is computed again in every step.
        kernels: what runs each operation.
        allowed: (V,), true for ids that may be sampled.
    """

    def __init__(self, model: Model, *, kernels: KernelSet, allowed: npt.ArrayLike):
        self.model, self.kernels = model, kernels
        self.weights = weights_of(model)
        self._allowed = packed(allowed)
        self._masks: dict[int, mx.array] = {}
        table = model.embedding
        self._table = table if isinstance(table, Matrix) else table.rows(mx.array([0]))
        self.traces = self._forgotten = 0
        self._compiled = _compiled(self.step)
        self._together: weakref.WeakSet[Decoding] = weakref.WeakSet()  # of the last step

    def step(
        self,
        frozen: list[list[Segment]],
        append: list[Segment],
        token: mx.array,
        control: mx.array,
        sampling: mx.array,
        allowed: mx.array,
        weights: Weights,
        *,
        filtered: bool,
    ) -> tuple[mx.array, mx.array, mx.array, list[Segment]]:
        """Feed one token a row and sample the next: what `mx.compile` traces.

        Args:
            frozen: for each cache, keys and values of each layer: (R, Hkv, C, 64), or a ring
                (R, Hkv, W, 64), of its R of the B rows, and of its own C.
            append: see `StepArrays`.
            token: (B,) int32, rows of the embedding in `weights`.
            control: (B, 8) int32.
            sampling: (B, 8) float32, see `kernels.sample_filtered`.
            allowed: (B, V/32) uint32, see `sampling.packed`.
            weights: as `Decoder.weights`.
            filtered: some row has a top-k, top-p or min-p.

        Returns:
            token, control, logprob and append of the next state.
        """
        self.traces += 1
        k, c, model = self.kernels, self.model.config, self.model
        eps, rope = c.rms_norm_eps, weights["rope"]
        ends = accumulate(layers[0][0].shape[0] for layers in frozen)
        spans = [slice(end - f[0][0].shape[0], end) for f, end in zip(frozen, ends, strict=True)]
        x = k.embed(
            token,
            given(self._table, weights["embedding"]),
            width=c.hidden_size,
            dtype=model.dtype,
        )
        appended = []
        for n, kind in enumerate(c.layer_types):
            layer = weights["layers"][n]
            attention, moe = model.layers[n]
            projections = [given(getattr(attention, p), layer[p]) for p in ("q", "k", "v")]
            q, recent = k.norm_qkv_rope(
                x, layer["norm"], projections, rope, control=control, append=append[n], eps=eps
            )
            appended.append(recent)
            mixed = [
                self._attend(
                    kind,
                    q[rows],
                    layers[n],
                    (recent[0][rows], recent[1][rows]),
                    layer["sinks"],
                    control[rows],
                )
                for layers, rows in zip(frozen, spans, strict=True)
            ]
            x = k.out_residual(mx.concatenate(mixed), given(attention.out, layer["out"]), x)
            y, logits = k.route(x, layer["moe_norm"], given(moe.router, layer["router"]), eps=eps)
            matrices = [given(getattr(moe, m), layer[m]) for m in ("gate", "up", "down")]
            x = self._experts(x, y, logits, matrices)
        logits, best = k.unembed(
            x,
            weights["norm"],
            given(model.unembedding, weights["unembedding"]),
            allowed=allowed,
            control=control,
            temperature=sampling,
            eps=eps,
        )
        if filtered:
            token, logprob, control = k.sample_filtered(
                best, logits, allowed=allowed, control=control, sampling=sampling
            )
        else:
            token, logprob, control = k.sample_token(best, logits, control=control)
        return token, control, logprob, appended

    def _experts(
        self, x: mx.array, y: mx.array, logits: mx.array, matrices: list[Matrix]
    ) -> mx.array:
        """The chosen experts of each row, read row by row or once for all rows that share one."""
        k, c, (gate, up, down) = self.kernels, self.model.config, matrices
        rest = {
            "chosen": c.num_experts_per_tok,
            "alpha": c.swiglu_alpha,
            "limit": c.swiglu_limit,
        }
        if not (k.groups_experts and groups_experts(x.shape[0], c.num_local_experts)):
            h = k.experts_swiglu(y, logits, gate, up, **rest)
            return k.experts_down(h, logits, down, x)
        blocks, choice = k.expert_groups(logits, chosen=c.num_experts_per_tok)
        h = k.experts_swiglu_grouped(y, blocks, gate, up, **rest)
        sums = k.experts_down_grouped(h, blocks, choice, down)
        assert down.bias is not None
        return k.experts_sum(sums, choice, down.bias, x)

    def _attend(
        self,
        kind: str,
        q: mx.array,
        frozen: Segment,
        append: Segment,
        sinks: mx.array,
        control: mx.array,
    ) -> mx.array:
        k, scale = self.kernels, self.model.softmax_scale
        if kind != FULL:
            return k.attention_window(q, frozen, append, sinks, control=control, scale=scale)
        # the definition's work grows with the splits, the kernel's does not
        plain = "attention_decode" in k.fallbacks
        splits = 1 if plain else splits_for(frozen[0].shape[2])
        sums, ends = k.attention_decode(
            q, frozen, append, control=control, splits=splits, scale=scale
        )
        return k.attention_reduce(sums, ends, sinks, dtype=q.dtype)

    def _fed(self, token: mx.array) -> tuple[mx.array, Weights]:
        """Which rows of which embedding a step reads: of the whole, or of one made for it."""
        table = self.model.embedding
        if isinstance(table, Matrix):
            return token, self.weights
        rows = arrays_of(table.rows(token))
        return mx.arange(token.size, dtype=mx.int32), self.weights | {"embedding": rows}

    def allowed(self, rows: int) -> mx.array:
        """What may be sampled by so many rows, (rows, V/32) uint32."""
        if rows not in self._masks:
            self._masks[rows] = mx.array(np.tile(self._allowed, (rows, 1)))
        return self._masks[rows]

    def start(
        self,
        cache: ModelCache,
        token: mx.array,
        *,
        sampling: Sequence[SamplingParams],
    ) -> Decoding:
        """Begin to decode after a prompt.

        Args:
            cache: holds the prompt but for its last token, without padding; `Decoding` extends it.
            token: (R,) int32, the token to feed first to each row of the cache.
            sampling: of each row, with a seed.

        Raises:
            CacheError: rows of the cache are padded.
        """
        return Decoding(
            cache, token, config=self.model.config, dtype=self.model.dtype, sampling=sampling
        )

    def advance(self, decodings: Sequence[Decoding]) -> None:
        """Launch the next step of several generations together; each can still drop it.

        Args:
            decodings: different ones, of this decoder; they may be others in every step.
        """
        if self.traces - self._forgotten >= MOST_TRACES:
            self._compiled, self._forgotten = _compiled(self.step), self.traces
        # Batches that differ in order alone would be traced anew.
        decodings = sorted(decodings, key=lambda one: one.capacity)
        for one in decodings:
            one.make_room()
        for left in self._together - set(decodings):
            left.stand_alone()
        self._together = weakref.WeakSet(decodings)
        batch = joined([one.state for one in decodings])
        fed, weights = self._fed(batch.token)
        filtered = any(one.filtered for one in decodings)
        token, control, logprob, append = self._compiled[filtered](
            [one.frozen for one in decodings],
            batch.append,
            fed,
            batch.control,
            batch.sampling,
            self.allowed(batch.token.size),
            weights,
        )
        after = StepArrays(
            token=token,
            control=control,
            logprob=logprob,
            sampling=batch.sampling,
            append=append,
        )
        first = 0
        for one in decodings:
            one.step_to(after, first)
            first += one.state.count
        mx.async_eval(after.arrays, [one.state.token for one in decodings])


def _compiled(step: Callable[..., Any]) -> dict[bool, Callable[..., Any]]:
    """The step without and with filters: a batch without any skips `sample_filtered`'s passes."""
    return {filtered: mx.compile(partial(step, filtered=filtered)) for filtered in (False, True)}
