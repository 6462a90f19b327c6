"""The decode loop: token ids in, sampled token ids out, one step ahead of the host.

While the host looks at a token, the device already computes the next one from it: at most two steps
are in flight. A step computed in vain, because its input was the last token, is dropped by putting
the cache back. Several generations may take each step together, which reads the weights once for
all of them; a single one is a batch of one. Beside a guided one all feed their tokens ahead, and
choose the next ones once its guide has seen its own. The engine knows nothing of text or harmony,
and belongs to one thread.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.decode import Decoder
from mlx_gptoss.errors import ContextLengthError
from mlx_gptoss.generation_stats import GenerationStats, Meter
from mlx_gptoss.model import Model
from mlx_gptoss.pacing import TARGET_S, ChunkPacer
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.steps import Guide, KernelSteps, ModelSteps, Steps

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


class Engine:
    """Generates from one model; its generations may take turns, or their steps together.

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
        self._allowed = allowed
        self._decoder: Decoder | None = None
        # MLX keeps the inputs of work in flight, not its outputs: whoever drops a step holds it
        # here until later work has been waited for, so that its buffers are not given away. Each
        # generation drops two at most, and the next one waits for its prompt.
        self.dropped: deque[mx.array] = deque(maxlen=2 * MOST_AT_ONCE)

    def begin(
        self,
        logits: mx.array,
        cache: ModelCache,
        *,
        sampling: SamplingParams,
        guide: Guide | None,
    ) -> tuple[mx.array, Steps]:
        """Launch the first token after a prompt, from (1, V); it, and what takes the steps after.

        The kernels take them where some are used.
        """
        plain = ModelSteps(self.model, cache, sampling=sampling, allowed=self._allowed, guide=guide)
        token = plain.first(logits)
        kernels = self.model.kernels
        if not kernels.used:
            return token, plain
        if self._decoder is None:
            self._decoder = Decoder(self.model, kernels=kernels, allowed=self._allowed)
        # `plain` ends here: its snapshot would turn every merge into a copy
        return token, KernelSteps(self._decoder, cache, sampling=sampling, guide=guide)

    def launch(self, generations: Sequence["Generation"]) -> None:
        """Take the next step of several generations together.

        Each is to be asked for its token next, and raises there what went wrong here; whoever asks
        without launching launches that generation alone.

        Args:
            generations: Different ones, of this engine; those that have ended are left alone.
        """
        ready = [one for one in generations if one._prepare()]
        late = [one for one in ready if one._is_read]
        _take(late)
        for one in late:
            one._shift()
        ahead = [one for one in ready if one._may_run_ahead]
        if any(one._guide is not None for one in ahead):
            _feed(ahead)
        else:
            _take(ahead)

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
        self._meter = Meter(len(prompt), cache.offset)
        self._steps: Steps | None = None  # once the prompt is fed
        self._token: mx.array | None = None  # to be read next, or `_is_read` already
        self._is_read = False
        self._ahead: mx.array | None = None  # the token after it
        self._is_launched = self._is_over = False
        self._fault: Exception | None = None

    def __next__(self) -> int:
        if self._is_over:
            raise StopIteration
        try:
            if not self._is_launched:
                self._engine.launch([self])
            return self._read()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not done yet; does nothing after the end."""
        self._end()
        self.finish = self.finish or Finish.CANCELLED

    def feed(self) -> bool:
        """Feed one chunk of the prompt, and say whether others follow.

        The first token follows the last chunk, and is launched with it. Taking that token feeds
        all that is left; whoever has more to do than this generation calls this before, until it
        returns False.
        """
        if self._is_over or not self._left:
            return False
        if (count := self._chunk()) == len(self._left):
            self._feed_last()
            return False
        began = time.perf_counter()
        self._engine.model.hidden(self._taken(count), self.cache)
        mx.eval(self.cache.arrays)  # the chunk's own logits are never computed
        self._engine.pacer.note(count, time.perf_counter() - began)
        self._tell()
        return True

    @property
    def stats(self) -> GenerationStats:
        """What it cost so far."""
        return self._meter.stats

    def _feed_last(self) -> None:
        logits = self._engine.model.next_logits(self._taken(len(self._left)), self.cache)
        mx.eval(logits, self.cache.arrays)
        self._tell()
        self._token, self._steps = self._engine.begin(
            logits, self.cache, sampling=self.sampling, guide=self._guide
        )

    def _prepare(self) -> bool:
        """Get ready for a step; False where none is to be taken."""
        if self._is_over or self._is_launched:
            return False
        self._is_launched = True
        try:
            while self.feed():
                pass
            if self._ahead is not None:
                self._shift()
            elif self._is_read and self._steps is not None:
                self._steps.ready()
        except Exception as error:
            self._fault = error
        return self._fault is None

    def _shift(self) -> None:
        """Go on to the token that was launched ahead; its step counts."""
        if self._steps is not None and self._ahead is not None:
            self._token, self._ahead, self._is_read = self._ahead, None, False
            self._steps.keep()

    @property
    def _may_run_ahead(self) -> bool:
        """Whether the token to be read can be fed before it is."""
        if self._fault is not None or self._steps is None or self._steps.waits:
            return False
        return self._meter.emitted + 1 < self._limit

    def _read(self) -> int:
        """Wait for the token that was launched."""
        self._is_launched = False
        if self._fault is not None:
            try:
                raise self._fault
            finally:
                self._fault = None  # or the error, its traceback and the cache hold each other
        assert self._token is not None
        chosen, self._is_read = int(self._token), True
        self._meter.note_token()
        if self._guide is not None:
            self._guide.accept(chosen)
        if chosen in self._stop:
            self.finish = Finish.STOP
        elif self._meter.emitted == self._limit:
            self.finish = Finish.LENGTH
        if self.finish:
            self._end()
        return chosen

    def _end(self) -> None:
        """Drop what is in flight and bring the cache to the last step that counts."""
        if self._is_over:
            return
        self._is_over = True
        self._engine.dropped.extend(a for a in (self._token, self._ahead) if a is not None)
        if self._steps is not None:
            self._engine.dropped.extend(self._steps.end())
        self._steps = self._token = self._ahead = None

    def _chunk(self) -> int:
        """Tokens of the next chunk: to the next break, as many as the pacer says at most."""
        at, most = self.cache.offset, self._engine.pacer.size
        return min([most, len(self._left), *(b - at for b in self._breaks if b > at)])

    def _taken(self, count: int) -> mx.array:
        """The next tokens to feed, (1, T) int32."""
        chunk, self._left = self._left[:count], self._left[count:]
        return mx.array([chunk], dtype=mx.int32)

    def _tell(self) -> None:
        total = len(self._prompt) - self._meter.cached_tokens
        self._on_prefill(total - len(self._left), total)


def _take(generations: Sequence[Generation]) -> None:
    """Launch the next tokens of generations whose steps are of one kind."""
    with _one_fault(generations) as (steps, tokens):
        ahead = type(steps[0]).take(steps, tokens) if steps else []
        for one, token in zip(generations, ahead, strict=True):
            one._ahead = token


def _feed(generations: Sequence[Generation]) -> None:
    """Launch what those steps can do without a guide."""
    with _one_fault(generations) as (steps, tokens):
        type(steps[0]).feed(steps, tokens)


@contextmanager
def _one_fault(
    generations: Sequence[Generation],
) -> Iterator[tuple[list[Steps], list[mx.array]]]:
    """Steps and tokens of generations that go on together; what fails for one fails for all."""
    try:
        yield (
            [one._steps for one in generations if one._steps is not None],
            [one._token for one in generations if one._token is not None],
        )
    except Exception as error:
        for one in generations:
            one._fault = error
