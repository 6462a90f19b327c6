"""The decode loop: token ids in, sampled token ids out, one step ahead of the host.

While the host looks at a token, the device already computes the next one from it: at most two steps
are in flight. A step computed in vain, because its input was the last token, is dropped by putting
the cache back. The engine knows nothing of text or harmony, and belongs to one thread.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.decode import Decoder
from mlx_gptoss.errors import ContextLengthError
from mlx_gptoss.model import Model
from mlx_gptoss.pacing import TARGET_S, ChunkPacer
from mlx_gptoss.sampling import SamplingParams, SamplingRows
from mlx_gptoss.steps import Guide, KernelSteps, ModelSteps

MOST_AT_ONCE = 16  # generations of one engine that may take turns
PREFILL_CHUNK = 512  # tokens at most; bounds the memory of a long prompt


class Finish(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token was sampled; it is the last token emitted."""
    LENGTH = "length"
    """`max_tokens` or the end of the context was reached."""
    CANCELLED = "cancelled"
    """The caller closed it."""


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What a generation cost.

    Attributes:
        prompt_tokens: Of the whole prompt.
        cached_tokens: Of it, already in the cache.
        completion_tokens: Emitted so far, a stop token included.
        ttft_s: From the call of `generate` to the first token; None before it.
        prefill_tok_per_s: Prompt tokens fed, over `ttft_s`; None before the first token.
        decode_tok_per_s: Tokens after the first, over their time; None before the second.
        peak_memory_bytes: MLX's highest allocation in this process so far, weights included.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float | None
    prefill_tok_per_s: float | None
    decode_tok_per_s: float | None
    peak_memory_bytes: int


class Engine:
    """Generates from one model; its generations may take turns, token by token.

    Args:
        model: The model.
        allowed: (V,) bool, the ids that may be sampled; None allows all.
        prefill_chunk: Most prompt tokens fed at once, >= 1.
        chunk_target_s: Seconds that feeding some of them may take, before there are fewer.

    Raises:
        ValueError: `allowed` is not of the model's vocabulary, or allows nothing.
    """

    def __init__(
        self,
        model: Model,
        *,
        allowed: npt.NDArray[np.bool_] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        chunk_target_s: float = TARGET_S,
    ) -> None:
        size = model.config.vocab_size
        allowed = np.ones(size, dtype=np.bool_) if allowed is None else np.asarray(allowed)
        if allowed.shape != (size,) or not allowed.any():
            raise ValueError(
                f"allowed: expected {size} flags, one for each id and one at least true, "
                f"got {allowed.sum()} true of shape {allowed.shape}"
            )
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: expected a whole number >= 1, got {prefill_chunk}")
        self.model = model
        self.pacer = ChunkPacer(prefill_chunk, target_s=chunk_target_s)
        self.allowed = mx.array(allowed.tolist())
        self._decoder: Decoder | None = None
        # MLX keeps the inputs of work in flight, not its outputs: whoever drops a step holds it
        # here until later work has been waited for, so that its buffers are not given away. Each
        # generation drops one at most, and the next one waits for its prompt.
        self.dropped: deque[mx.array] = deque(maxlen=MOST_AT_ONCE)

    def steps(self, cache: ModelCache, sampling: SamplingParams) -> KernelSteps | None:
        """Steps made of kernels; None where no kernel is used, or none samples in this way."""
        kernels = self.model.kernels
        if not kernels.used or not KernelSteps.can_sample(sampling):
            return None
        if self._decoder is None:
            self._decoder = Decoder(self.model, kernels=kernels, allowed=self.allowed)
        return KernelSteps(self._decoder, cache, sampling=sampling)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        stop: Collection[int] = (),
        max_tokens: int | None = None,
        cache: ModelCache | None = None,
        breaks: Collection[int] = (),
        guide: Guide | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> "Generation":
        """Start a generation; the work happens as its tokens are asked for.

        Args:
            prompt: Token ids of the whole prompt.
            sampling: How to choose tokens; default: temperature 1, nothing filtered.
            stop: Ids that end the generation; the one sampled is emitted too.
            max_tokens: Most tokens to emit, >= 1; None: as many as the context holds.
            cache: Holds the first `cache.offset` tokens of the prompt, which are not fed again;
                None starts an empty one. See `Generation.cache` for what it holds afterwards.
            breaks: Positions in the prompt at which a chunk ends, so that `on_prefill` can save the
                cache there.
            guide: Narrows what may be chosen, token by token.
            on_prefill: Called after each chunk with the tokens fed and to feed; what it raises ends
                the generation.

        Raises:
            ValueError: Empty prompt, an id outside the vocabulary, `max_tokens` below 1, or a cache
                that already holds the whole prompt.
            ContextLengthError: The prompt leaves no room for an answer.
        """
        size, context = self.model.config.vocab_size, self.model.config.max_position_embeddings
        cache = self.model.make_cache() if cache is None else cache
        wrong = [token for token in prompt if not 0 <= token < size]
        if not prompt or wrong:
            got = f"{wrong[0]}" if wrong else "none"
            raise ValueError(f"prompt: expected token ids from 0 to {size - 1}, got {got}")
        if cache.offset >= len(prompt):
            raise ValueError(
                f"cache: expected to hold less than the prompt's {len(prompt)} tokens, got "
                f"{cache.offset}; the last token must be fed to know what follows it"
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: expected a whole number >= 1 or None, got {max_tokens}")
        if len(prompt) >= context:
            raise ContextLengthError(
                f"prompt: expected fewer than {context} tokens, the context of this model, got "
                f"{len(prompt)}; shorten it"
            )
        room = context - len(prompt)
        return Generation(
            self,
            list(prompt),
            sampling=(sampling or SamplingParams()).seeded(),
            stop=frozenset(stop),
            limit=room if max_tokens is None else min(room, max_tokens),
            cache=cache,
            breaks=frozenset(breaks),
            guide=guide,
            on_prefill=on_prefill,
        )


class Generation(Iterator[int]):
    """The tokens of one generation, computed as they are taken; made by `Engine.generate`.

    Closing it, or leaving its `with` block, cancels what is not done yet.

    Attributes:
        sampling: The parameters, with the seed that was drawn if none was given.
        finish: Why it ended; None while it runs.
        cache: After the end, the prompt and every emitted token but the last, which was never
            needed as an input. Unusable after an error.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        *,
        sampling: SamplingParams,
        stop: frozenset[int],
        limit: int,
        cache: ModelCache,
        breaks: frozenset[int],
        guide: Guide | None,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self.sampling = sampling
        self.cache = cache
        self.finish: Finish | None = None
        self._engine, self._prompt, self._stop, self._limit = engine, prompt, stop, limit
        self._breaks, self._on_prefill = breaks, on_prefill or (lambda done, total: None)
        self._left, self._guide = prompt[cache.offset :], guide
        self._rows = SamplingRows.pack([sampling])
        self._cached = cache.offset
        self._emitted = 0
        self._began = time.perf_counter()
        self._first_at = self._last_at = self._began
        self._tokens = self._run()

    def __next__(self) -> int:
        return next(self._tokens)

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not done yet; does nothing after the end."""
        self._tokens.close()
        self.finish = self.finish or Finish.CANCELLED

    def feed(self) -> bool:
        """Feed one chunk of the prompt, unless it is the last, and say whether others follow.

        Taking the first token feeds them all; whoever has more to do than this generation calls
        this before, until it returns False.
        """
        if (count := self._chunk()) < len(self._left):
            began = time.perf_counter()
            self._engine.model.hidden(self._taken(count), self.cache)
            mx.eval(self.cache.arrays)  # the chunk's own logits are never computed
            self._engine.pacer.note(count, time.perf_counter() - began)
            self._tell()
        return self._chunk() < len(self._left)

    @property
    def stats(self) -> GenerationStats:
        """What it cost so far."""
        began, first, n = self._began, self._first_at, self._emitted
        fed = len(self._prompt) - self._cached
        return GenerationStats(
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            completion_tokens=n,
            ttft_s=first - began if n else None,
            prefill_tok_per_s=fed / (first - began) if n else None,
            decode_tok_per_s=(n - 1) / (self._last_at - first) if n > 1 else None,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def _run(self) -> Generator[int, None, None]:
        """Feed the prompt, then stay one step ahead until a reason to stop."""
        logits = self._prefill()
        first = ModelSteps(
            self._engine.model,
            self.cache,
            rows=self._rows,
            allowed=self._engine.allowed,
            guide=self._guide,
        )
        token, ahead = first.choose(logits), None
        compiled = None if self._guide else self._engine.steps(self.cache, self.sampling)
        steps = compiled or first
        if compiled:
            first.let_go()  # its snapshot would turn every merge into a copy
        try:
            while True:
                self._emitted += 1
                full = self._emitted == self._limit
                if not full and not steps.merges_next:
                    ahead = steps.take(token)  # launched before the host waits for `token`
                chosen = int(token)
                self._note_time()
                if self._guide is not None:
                    self._guide.accept(chosen)
                if chosen in self._stop:
                    self.finish = Finish.STOP
                elif full:
                    self.finish = Finish.LENGTH
                yield chosen
                if self.finish:
                    return
                if ahead is None:  # guided; or one step in 128, with nothing in flight and no
                    steps.let_go()  # snapshot held, so that long stores are merged in place
                    ahead = steps.take(token)
                token, ahead = ahead, None
                steps.keep()
        finally:
            if ahead is not None:
                self._engine.dropped.append(ahead)
            steps.end()

    def _prefill(self) -> mx.array:
        """Feed what is left of the prompt; (1, V) logits after its last token."""
        while self.feed():
            pass
        logits = self._engine.model.next_logits(self._taken(len(self._left)), self.cache)
        mx.eval(logits, self.cache.arrays)
        self._tell()
        return logits

    def _chunk(self) -> int:
        """Tokens of the next chunk: to the next break, as many as the pacer says at most."""
        at, most = self.cache.offset, self._engine.pacer.size
        return min([most, len(self._left), *(b - at for b in self._breaks if b > at)])

    def _taken(self, count: int) -> mx.array:
        """The next tokens to feed, (1, T) int32."""
        chunk, self._left = self._left[:count], self._left[count:]
        return mx.array([chunk], dtype=mx.int32)

    def _tell(self) -> None:
        total = len(self._prompt) - self._cached
        self._on_prefill(total - len(self._left), total)

    def _note_time(self) -> None:
        self._last_at = time.perf_counter()
        if self._emitted == 1:
            self._first_at = self._last_at
