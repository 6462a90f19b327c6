"""A decode step as functions of arrays, made of our kernels: what `mx.compile` traces.

Nothing in it depends on a value the host holds: position, base and slot are in a control array that
the step itself advances, the token is sampled on the device. A step is its layers, which need the
token before, and then the choice of the next, which alone needs to know what may come.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx

from mlx_gptoss.cache import Segment
from mlx_gptoss.config import FULL
from mlx_gptoss.decode_weights import Weights, given
from mlx_gptoss.kernels import products
from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.batches import experts_form, takes_mlx
from mlx_gptoss.kernels.selection import KernelSet, dense_form
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model
from mlx_gptoss.moe import sorted_experts

Chosen = tuple[mx.array, mx.array, mx.array]  # token, control and logprob of the next state


class DecodeStep:
    """The step of one model.

    Args:
        model: whose sizes and packings it knows; its weights are given with each call.
        kernels: what runs each operation.

    Attributes:
        traces: how often the layers were traced.
    """

    def __init__(self, model: Model, kernels: KernelSet):
        self._model, self._kernels = model, kernels
        table = model.embedding
        self._table = table if isinstance(table, Matrix) else table.rows(mx.array([0]))
        self.traces = 0

    def __call__(
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
    ) -> tuple[Chosen, list[Segment]]:
        """Feed one token a row and choose the next.

        Args:
            frozen: see `layers`.
            append: see `layers`.
            token: see `layers`.
            control: see `layers`.
            sampling: see `choose`.
            allowed: see `choose`.
            weights: as `decode_weights.weights_of`.
            filtered: see `choose`.

        Returns:
            What `choose` returns, and the append segments of `layers`.
        """
        x, appended = self.layers(frozen, append, token, control, weights)
        return self.choose(x, control, sampling, allowed, weights, filtered=filtered), appended

    def layers(
        self,
        frozen: list[list[Segment]],
        append: list[Segment],
        token: mx.array,
        control: mx.array,
        weights: Weights,
    ) -> tuple[mx.array, list[Segment]]:
        """Feed one token a row.

        Args:
            frozen: for each cache, keys and values of each layer: (R, Hkv, C, 64), or a ring
                (R, Hkv, W, 64), of its R of the B rows, and of its own C.
            append: see `StepArrays`.
            token: (B,) int32, rows of the embedding in `weights`.
            control: (B, 8) int32.
            weights: of the embedding, the layers and the rotation.

        Returns:
            The residual stream (B, D) after the layers, and append with the token's rows.
        """
        self.traces += 1
        k, c, model = self._kernels, self._model.config, self._model
        rows, eps, rope = token.size, c.rms_norm_eps, weights["rope"]
        route = self._taken("route", c.num_local_experts, rows)
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
            q, recent = self._dense("norm_qkv_rope", attention.q, rows)(
                x, layer["norm"], projections, rope, control=control, append=append[n], eps=eps
            )
            appended.append(recent)
            mixed = [
                self._attend(
                    kind,
                    q[own],
                    layers[n],
                    (recent[0][own], recent[1][own]),
                    layer["sinks"],
                    control[own],
                )
                for layers, own in zip(frozen, spans, strict=True)
            ]
            out = self._dense("out_residual", attention.out, rows)
            x = out(mx.concatenate(mixed), given(attention.out, layer["out"]), x)
            y, logits = route(x, layer["moe_norm"], given(moe.router, layer["router"]), eps=eps)
            matrices = [given(getattr(moe, m), layer[m]) for m in ("gate", "up", "down")]
            x = self._experts(x, y, logits, matrices)
        return x, appended

    def choose(
        self,
        x: mx.array,
        control: mx.array,
        sampling: mx.array,
        allowed: mx.array,
        weights: Weights,
        *,
        filtered: bool,
    ) -> Chosen:
        """Sample the token of each row that follows the one fed.

        Args:
            x: (B, D), of `layers`.
            control: as it was given to `layers`.
            sampling: (B, 8) float32, see `kernels.sample_filtered`.
            allowed: (B, V/32) uint32, see `sampling.packed`.
            weights: of the last norm and the unembedding.
            filtered: some row has a top-k, top-p or min-p.

        Returns:
            token, control and logprob of the next state.
        """
        k, model = self._kernels, self._model
        logits, best = self._dense("unembed", model.unembedding, x.shape[0])(
            x,
            weights["norm"],
            given(model.unembedding, weights["unembedding"]),
            allowed=allowed,
            control=control,
            temperature=sampling,
            eps=model.config.rms_norm_eps,
        )
        if filtered:
            token, logprob, control = k.sample_filtered(
                best, logits, allowed=allowed, control=control, sampling=sampling
            )
        else:
            token, logprob, control = k.sample_token(best, logits, control=control)
        return token, control, logprob

    def _dense(self, stem: str, matrix: Matrix, rows: int) -> Callable[..., Any]:
        """What multiplies so many rows by a matrix; a layer's q, k and v are packed alike."""
        return self._taken(stem, dense_form(matrix), rows)

    def _taken(self, stem: str, packing_or_experts: str | int, rows: int) -> Callable[..., Any]:
        if takes_mlx(stem, packing_or_experts, rows):
            return partial(products.PRODUCTS[stem], kernels=self._kernels)
        return getattr(self._kernels, stem)

    def _experts(
        self, x: mx.array, y: mx.array, logits: mx.array, matrices: list[Matrix]
    ) -> mx.array:
        """The chosen experts of each row, read row by row or once for all rows that share one."""
        k, c, (gate, up, down) = self._kernels, self._model.config, matrices
        chosen, clamps = c.num_experts_per_tok, {"alpha": c.swiglu_alpha, "limit": c.swiglu_limit}
        form = experts_form(c.num_local_experts, x.shape[0]) if k.groups_experts else "rows"
        if form == "rows":
            h = k.experts_swiglu(y, logits, gate, up, chosen=chosen, **clamps)
            return k.experts_down(h, logits, down, x)
        blocks, choice = k.expert_groups(logits, chosen=chosen)
        if form == "mlx":
            pairs = (choice[..., 0].astype(mx.uint32), choice[..., 1])
            return sorted_experts(x, y, pairs, (gate, up, down), kernels=k, **clamps)
        h = k.experts_swiglu_grouped(y, blocks, gate, up, chosen=chosen, **clamps)
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
        k, scale = self._kernels, self._model.softmax_scale
        if kind != FULL:
            return k.attention_window(q, frozen, append, sinks, control=control, scale=scale)
        # the definition's work grows with the splits, the kernel's does not
        plain = "attention_decode" in k.fallbacks
        splits = 1 if plain else splits_for(frozen[0].shape[2])
        sums, ends = k.attention_decode(
            q, frozen, append, control=control, splits=splits, scale=scale
        )
        return k.attention_reduce(sums, ends, sinks, dtype=q.dtype)
