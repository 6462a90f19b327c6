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
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx

from mlx_gptoss.cache import FullCache, ModelCache, Segment
from mlx_gptoss.config import FULL
from mlx_gptoss.decode_state import DecodeState, StepArrays, joined
from mlx_gptoss.decode_weights import Weights, arrays_of, given, weights_of
from mlx_gptoss.errors import CacheError
from mlx_gptoss.kernels.attention import splits_for
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams

ROWS = 128  # of an append segment: 0.25% of a token's bytes are copied, one merge in 128 tokens
CONTROL = 8  # columns: position, base, slot, seed low, seed high; 8 make MLX pass a device pointer

MOST_TRACES = 64  # of one compiled function, which keeps them all: one for each set of shapes


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
        self.weights = weights_of(model, allowed.astype(mx.uint8))
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
            h = k.experts_swiglu(
                y,
                logits,
                given(moe.gate, layer["gate"]),
                given(moe.up, layer["up"]),
                chosen=c.num_experts_per_tok,
                alpha=c.swiglu_alpha,
                limit=c.swiglu_limit,
            )
            x = k.experts_down(h, logits, given(moe.down, layer["down"]), x)
        logits, best = k.unembed(
            x,
            weights["norm"],
            given(model.unembedding, weights["unembedding"]),
            allowed=weights["allowed"],
            control=control,
            temperature=sampling,
            eps=eps,
        )
        if filtered:
            token, logprob, control = k.sample_filtered(
                best, logits, allowed=weights["allowed"], control=control, sampling=sampling
            )
        else:
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

    def _fed(self, token: mx.array) -> tuple[mx.array, Weights]:
        """Which rows of which embedding a step reads: of the whole, or of one made for it."""
        table = self.model.embedding
        if isinstance(table, Matrix):
            return token, self.weights
        rows = arrays_of(table.rows(token))
        return mx.arange(token.size, dtype=mx.int32), self.weights | {"embedding": rows}

    def start(
        self,
        cache: ModelCache,
        token: mx.array,
        *,
        sampling: Sequence[SamplingParams],
    ) -> "Decoding":
        """Begin to decode after a prompt.

        Args:
            cache: holds the prompt but for its last token, without padding; `Decoding` extends it.
            token: (R,) int32, the token to feed first to each row of the cache.
            sampling: of each row, with a seed.

        Raises:
            CacheError: rows of the cache are padded.
        """
        return Decoding(self, cache, token, sampling=sampling)

    def advance(self, decodings: Sequence["Decoding"]) -> None:
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


class Decoding:
    """One generation: its newest state, and the frozen segments that it builds on.

    Attributes:
        state: the newest state; its token is not fed yet.
        frozen: keys and values of each layer up to the last merge.
        filtered: some row has a top-k, top-p or min-p.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: ModelCache,
        token: mx.array,
        *,
        sampling: Sequence[SamplingParams],
    ):
        if cache.start is not None:
            raise CacheError(
                f"cache: expected rows without padding, got {list(cache.left_padding)} tokens of "
                "it; the compiled step takes rows of any length, each with a cache of its own"
            )
        self._decoder, self._cache = decoder, cache
        self._previous: DecodeState | None = None
        c, count = decoder.model.config, token.size
        self.frozen = _frozen(cache)
        self.filtered = any(map(_filters, sampling))
        at = cache.offset
        rows = [[at, at, 0, *_words(params.seed or 0), 0, 0, 0] for params in sampling]
        shape = (count, c.num_key_value_heads, ROWS, c.head_dim)
        dtype = decoder.model.dtype
        step = StepArrays(
            token=token.astype(mx.int32),
            control=mx.array(rows, dtype=mx.int32),
            logprob=mx.zeros((count,)),
            sampling=mx.array([_columns(params) for params in sampling], mx.float32),
            append=[(mx.zeros(shape, dtype), mx.zeros(shape, dtype)) for _ in c.layer_types],
        )
        self.state = DecodeState.of(step, first=0, count=count, slot=0)
        mx.eval(step.arrays)

    @property
    def capacity(self) -> int:
        """Positions of the longest frozen segment."""
        return max(keys.shape[2] for keys, _ in self.frozen)

    def advance(self) -> None:
        """Launch the next step of this generation alone."""
        self._decoder.advance([self])

    def step_to(self, step: StepArrays, first: int) -> None:
        """Go on to this generation's rows of a step, and keep the state before it."""
        before = self._previous = self.state
        self.state = DecodeState.of(step, first=first, count=before.count, slot=before.slot + 1)

    def keep(self) -> None:
        """The last step counts: it can no longer be dropped."""
        self._previous = None

    def finish(self) -> None:
        """Drop the last step unless it was kept, and bring the cache to the state before it.

        The cache then holds every token fed before that state, and not the state's own.
        """
        self.state = self._previous or self.state
        self._merge()
        self.frozen = []

    def make_room(self) -> None:
        """Merge if the append segments are full, after everything in flight is done."""
        if self.state.slot == ROWS:
            self._merge()

    def stand_alone(self) -> None:
        """Let go of the arrays of a batch that goes on without this generation."""
        self.state = self.state.copied()
        self._previous = self._previous and self._previous.copied()

    def _merge(self) -> None:
        """Move the append rows into the cache."""
        slot, count, rows = self.state.slot, self.state.count, self.state.rows
        mx.synchronize()  # a buffer that a step still reads would be copied instead of reused
        self.frozen = []
        if slot:
            for layer, (keys, values) in zip(self._cache, rows.append, strict=True):
                layer.extend(keys[:, :, :slot], values[:, :, :slot])
                mx.eval(layer.arrays)  # one layer at a time: at most one buffer is copied
        self.frozen = _frozen(self._cache)
        position, rest = rows.control[:, :1], rows.control[:, 3:]
        control = mx.concatenate([position, position, mx.zeros_like(position), rest], axis=1)
        self.state = DecodeState.of(replace(rows, control=control), first=0, count=count, slot=0)
        mx.eval(control)


def _frozen(cache: ModelCache) -> list[Segment]:
    segments = [a.freeze() if isinstance(a, FullCache) else a.arrays for a in cache]
    mx.eval(segments)
    return segments


def _compiled(step: Callable[..., Any]) -> dict[bool, Callable[..., Any]]:
    """The step without and with filters: a batch without any skips `sample_filtered`'s passes."""
    return {filtered: mx.compile(partial(step, filtered=filtered)) for filtered in (False, True)}


def _filters(params: SamplingParams) -> bool:
    """Whether a top-k, top-p or min-p can change what is drawn."""
    return params.temperature > 0 and (
        params.top_k is not None or params.top_p < 1 or bool(params.min_p)
    )


def _columns(params: SamplingParams) -> list[float]:
    """A row of `kernels.sample_filtered`'s `sampling`; a greedy row needs no filter."""
    if not _filters(params):
        return [params.temperature, 0, 1, 0, 0, 0, 0, 0]
    top_k = min(params.top_k or 0, 2**22)  # more than any vocabulary, and exact in float32
    return [params.temperature, top_k, params.top_p, params.min_p or 0, 0, 0, 0, 0]


def _words(seed: int) -> tuple[int, int]:
    """The two halves of a seed as int32 values."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
