"""A decode step as one function of fixed shapes, compiled once, made of our kernels.

A custom kernel costs 30 to 50 microseconds of Python each time it is called, and a step has 159 of
them on the 20b; so the step is traced once by `mx.compile` and replayed. Nothing in it depends on
a value the host holds: position, base and slot are in a control array that the step itself
advances, the token is sampled on the device.

Keys and values: `frozen` segments are only read; the step returns new `append` segments of `ROWS`
rows, so MLX never copies more than those while a step is in flight. When they are full, `Decoding`
merges them into the cache. A step computed ahead is dropped by keeping the state before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx

from mlx_gptoss.cache import FullCache, ModelCache, Segment
from mlx_gptoss.config import FULL
from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model

ROWS = 128  # of an append segment: 0.25% of a token's bytes are copied, one merge in 128 tokens
CONTROL = 8  # columns: position, base, slot, seed low, seed high; 8 make MLX pass a device pointer

Weights = dict[str, Any]


@dataclass(frozen=True)
class DecodeState:
    """What one step leaves for the next.

    Attributes:
        token: (B,) int32, sampled, not yet fed.
        control: (B, 8) int32.
        logprob: (B,) float32 of `token`, at temperature 1.
        append: keys and values since the last merge, (B, Hkv, ROWS, 64) each, per layer.
        slot: rows of `append` in use.
    """

    token: mx.array
    control: mx.array
    logprob: mx.array
    append: list[Segment]
    slot: int

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate, and to keep until a later step has been waited for."""
        return [self.token, self.control, self.logprob, *(a for pair in self.append for a in pair)]


class Decoder:
    """The step of one model.

    Args:
        model: whose weights it reads; they are arguments of the compiled function, not constants,
            and should be evaluated: what is lazy is computed again in every step.
        kernels: what runs each operation.
        allowed: (V,) bool or uint8, ids that may be sampled.
    """

    def __init__(self, model: Model, *, kernels: KernelSet, allowed: mx.array):
        self.model, self.kernels = model, kernels
        self.weights = _weights(model, allowed.astype(mx.uint8))
        self.traces = 0
        self._compiled = mx.compile(self.step)

    def step(
        self,
        frozen: list[Segment],
        append: list[Segment],
        token: mx.array,
        control: mx.array,
        temperature: mx.array,
        weights: Weights,
    ) -> tuple[mx.array, mx.array, mx.array, list[Segment]]:
        """Feed one token a row and sample the next: what `mx.compile` traces.

        Args:
            frozen: keys and values of each layer: (B, Hkv, C, 64), or a ring (B, Hkv, W, 64).
            append: see `DecodeState`.
            token: (B,) int32.
            control: (B, 8) int32.
            temperature: (B, 8) float32 in column 0; 0 is greedy.
            weights: as `Decoder.weights`.

        Returns:
            token, control, logprob and append of the next state.
        """
        self.traces += 1
        k, c, model = self.kernels, self.model.config, self.model
        eps, rope = c.rms_norm_eps, weights["rope"]
        x = k.embed(
            token,
            _joined(model.embedding, weights["embedding"]),
            width=c.hidden_size,
            dtype=model.dtype,
        )
        appended = []
        for n, kind in enumerate(c.layer_types):
            layer = weights["layers"][n]
            attention, moe = model.layers[n]
            projections = [_joined(getattr(attention, p), layer[p]) for p in ("q", "k", "v")]
            q, recent = k.norm_qkv_rope(
                x, layer["norm"], projections, rope, control=control, append=append[n], eps=eps
            )
            appended.append(recent)
            mixed = self._attend(kind, q, frozen[n], recent, layer["sinks"], control)
            x = k.out_residual(mixed, _joined(attention.out, layer["out"]), x)
            y, logits = k.route(x, layer["moe_norm"], _joined(moe.router, layer["router"]), eps=eps)
            h = k.experts_swiglu(
                y,
                logits,
                _joined(moe.gate, layer["gate"]),
                _joined(moe.up, layer["up"]),
                chosen=c.num_experts_per_tok,
                alpha=c.swiglu_alpha,
                limit=c.swiglu_limit,
            )
            x = k.experts_down(h, logits, _joined(moe.down, layer["down"]), x)
        logits, best = k.unembed(
            x,
            weights["norm"],
            _joined(model.unembedding, weights["unembedding"]),
            allowed=weights["allowed"],
            control=control,
            temperature=temperature,
            eps=eps,
        )
        token, logprob, control = k.sample_token(best, logits, control=control)
        return token, control, logprob, appended

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

    def start(
        self,
        cache: ModelCache,
        token: mx.array,
        *,
        temperatures: Sequence[float],
        seeds: Sequence[int],
    ) -> "Decoding":
        """Begin to decode after a prompt.

        Args:
            cache: holds the prompt but for its last token, without padding; `Decoding` extends it.
            token: (B,) int32, the token to feed first.
            temperatures: of each row; 0 is greedy.
            seeds: of each row's noise, in [0, 2**64).
        """
        return Decoding(self, cache, token, temperatures=temperatures, seeds=seeds)


class Decoding:
    """One generation: states, and the frozen segments they build on.

    Attributes:
        state: the newest state; its token is not fed yet.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: ModelCache,
        token: mx.array,
        *,
        temperatures: Sequence[float],
        seeds: Sequence[int],
    ):
        self._decoder, self._cache = decoder, cache
        c, batch = decoder.model.config, token.size
        self._frozen = _frozen(cache)
        rows = [[cache.offset, cache.offset, 0, *_words(seed), 0, 0, 0] for seed in seeds]
        self._temperature = mx.array([[t, 0, 0, 0, 0, 0, 0, 0] for t in temperatures], mx.float32)
        shape = (batch, c.num_key_value_heads, ROWS, c.head_dim)
        dtype = decoder.model.dtype
        self.state = DecodeState(
            token=token.astype(mx.int32),
            control=mx.array(rows, dtype=mx.int32),
            logprob=mx.zeros((batch,)),
            append=[(mx.zeros(shape, dtype), mx.zeros(shape, dtype)) for _ in c.layer_types],
            slot=0,
        )
        mx.eval(self.state.arrays)

    def advance(self) -> DecodeState:
        """Launch the next step and return the state it began from, in case it must be dropped."""
        if self.state.slot == ROWS:
            self._merge()
        state, decoder = self.state, self._decoder
        token, control, logprob, append = decoder._compiled(
            self._frozen,
            state.append,
            state.token,
            state.control,
            self._temperature,
            decoder.weights,
        )
        self.state = DecodeState(token, control, logprob, append, state.slot + 1)
        mx.async_eval(self.state.arrays)
        return state

    def finish(self, state: DecodeState) -> None:
        """Bring the cache to a state: every token fed before it, and not its own.

        Args:
            state: the newest one, or the one that the last `advance` returned.
        """
        self.state = state
        self._merge()

    def _merge(self) -> None:
        """Move the append rows into the cache, after everything in flight is done."""
        state = self.state
        mx.synchronize()  # a buffer that a step still reads would be copied instead of reused
        self._frozen = []
        if state.slot:
            for layer, (keys, values) in zip(self._cache, state.append, strict=True):
                layer.extend(keys[:, :, : state.slot], values[:, :, : state.slot])
                mx.eval(layer.arrays)  # one layer at a time: at most one buffer is copied
        self._frozen = _frozen(self._cache)
        control = mx.concatenate(
            [
                state.control[:, :1],
                state.control[:, :1],
                mx.zeros_like(state.control[:, :1]),
                state.control[:, 3:],
            ],
            axis=1,
        )
        self.state = replace(state, control=control, slot=0)
        mx.eval(self.state.control)


def _frozen(cache: ModelCache) -> list[Segment]:
    segments = [a.freeze() if isinstance(a, FullCache) else a.arrays for a in cache]
    mx.eval(segments)
    return segments


def _words(seed: int) -> tuple[int, int]:
    """The two halves of a seed as int32 values."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def _arrays(matrix: Matrix) -> dict[str, mx.array]:
    found = {f.name: getattr(matrix, f.name) for f in fields(matrix)}
    return {name: value for name, value in found.items() if isinstance(value, mx.array)}


def _joined(matrix: Matrix, arrays: dict[str, mx.array]) -> Matrix:
    """A matrix with the arrays that the compiled function was given in the place of its own."""
    return replace(matrix, **arrays)


def _weights(model: Model, allowed: mx.array) -> Weights:
    layers = []
    for attention, moe in model.layers:
        matrices = {"q": attention.q, "k": attention.k, "v": attention.v, "out": attention.out}
        matrices |= {"router": moe.router, "gate": moe.gate, "up": moe.up, "down": moe.down}
        layer: Weights = {name: _arrays(matrix) for name, matrix in matrices.items()}
        layer |= {"norm": attention.norm, "sinks": attention.sinks, "moe_norm": moe.norm}
        layers.append(layer)
    rope = (model.rope.coarse, model.rope.fine)
    mx.eval(rope, allowed)
    return {
        "embedding": _arrays(model.embedding),
        "layers": layers,
        "norm": model.norm,
        "unembedding": _arrays(model.unembedding),
        "rope": rope,
        "allowed": allowed,
    }
