"""One turn of the model: prompt tokens in, typed harmony events out, and a summary of it all.

Ties the engine, which knows token ids, to the harmony parser, which knows what they mean.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_gptoss.cache import ModelCache
from mlx_gptoss.engine import Engine, Generation
from mlx_gptoss.errors import VocabularyError
from mlx_gptoss.harmony import (
    STOP_TOKENS,
    Channel,
    Event,
    FinishReason,
    HarmonyParser,
    Message,
    MessageDone,
    ReasoningDelta,
    TextDelta,
    ToolCallDone,
    TurnDone,
)
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.steps import Guide
from mlx_gptoss.vocabulary import load_vocabulary


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a turn.

    Attributes:
        prompt_tokens: Of the whole prompt.
        cached_tokens: Of it, those whose keys and values were reused.
        completion_tokens: Everything sampled.
        reasoning_tokens: Of that, the analysis, its framing included.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of a turn, waiting for other turns included.

    Attributes:
        ttft_s: Until the first token.
        prefill_tok_per_s: Prompt tokens computed, over `ttft_s`.
        decode_tok_per_s: Tokens after the first, over their time; None before the second.
    """

    ttft_s: float | None
    prefill_tok_per_s: float | None
    decode_tok_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a turn came to.

    Attributes:
        text: The answer.
        reasoning: The model's analysis, not meant for users.
        tool_calls: Complete calls, in order.
        finish_reason: Why the turn ended.
        messages: Everything the model wrote, for the next turn's conversation.
        usage: Tokens.
        timing: Times.
        seed: Of the sampling noise: the same seed gives the same reply.
        peak_memory_bytes: MLX's highest allocation in this process so far, weights included.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCallDone, ...]
    finish_reason: FinishReason
    messages: tuple[Message, ...]
    usage: Usage
    timing: Timing
    seed: int
    peak_memory_bytes: int


class Turn:
    """The model's next turn, written while its events are taken.

    Args:
        engine: An engine of a model with the gpt-oss vocabulary; see `harmony_engine`.
        prompt: Tokens of `render_conversation_for_completion`.
        sampling: How to choose tokens.
        max_tokens: Most tokens to sample; None: as many as the context holds.
        recipients: Tools that were offered; see `HarmonyParser`.
        cache: Holds the beginning of the prompt; see `Engine.generate`.
        breaks: See `Engine.generate`.
        guide: See `Engine.generate`.
        on_prefill: Called after each chunk of the prompt with the tokens fed and to feed.

    Attributes:
        tokens: What was sampled so far.
        generation: The engine's side: statistics, seed, cache.

    Raises:
        ContextLengthError: The prompt leaves no room for an answer.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        recipients: Mapping[str, str] | None = None,
        cache: ModelCache | None = None,
        breaks: Collection[int] = (),
        guide: Guide | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.generation: Generation = engine.generate(
            prompt,
            sampling=sampling,
            stop=STOP_TOKENS,
            max_tokens=max_tokens,
            cache=cache,
            breaks=breaks,
            guide=guide,
            on_prefill=on_prefill,
        )
        self._parser = HarmonyParser(recipients)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDone] = []
        self._messages: list[Message] = []
        self._reasoning_tokens = 0
        self._finish_reason: FinishReason | None = None

    def events(self) -> Iterator[Event]:
        """Sample to the end of the turn; the last event is `TurnDone`.

        Closing the iterator, or an interrupt, cancels the rest.
        """
        with self.generation:
            while not self.is_over:
                yield from self.advance()

    def advance(self) -> list[Event]:
        """Sample one token and return what it tells, often nothing; `TurnDone` is the last.

        The parser, not the stop tokens alone, says when a turn is over: a call that ends in
        `<|end|>` is one, and a model that went on would write the tool's answer itself.
        """
        token = next(self.generation, None)
        if token is not None:
            self.tokens.append(token)
        events = self._parser.finish() if token is None else self._parser.feed(token)
        for event in events:
            self._note(event)
        if self.is_over:
            self.generation.close()
        return events

    @property
    def is_over(self) -> bool:
        """Whether `TurnDone` was among the events."""
        return self._finish_reason is not None

    def reply(self) -> Reply:
        """Sample what is left and sum the turn up."""
        for _ in self.events():
            pass
        assert self._finish_reason is not None
        assert self.generation.sampling.seed is not None
        stats = self.generation.stats
        return Reply(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(self._calls),
            finish_reason=self._finish_reason,
            messages=tuple(self._messages),
            usage=Usage(
                prompt_tokens=stats.prompt_tokens,
                cached_tokens=stats.cached_tokens,
                completion_tokens=stats.completion_tokens,
                reasoning_tokens=self._reasoning_tokens,
            ),
            timing=Timing(
                ttft_s=stats.ttft_s,
                prefill_tok_per_s=stats.prefill_tok_per_s,
                decode_tok_per_s=stats.decode_tok_per_s,
            ),
            seed=self.generation.sampling.seed,
            peak_memory_bytes=stats.peak_memory_bytes,
        )

    def _note(self, event: Event) -> None:
        match event:
            case TextDelta(text):
                self._text.append(text)
            case ReasoningDelta(text):
                self._reasoning.append(text)
            case ToolCallDone():
                self._calls.append(event)
            case MessageDone(message, tokens):
                self._messages.append(message)
                if message.channel == Channel.ANALYSIS:
                    self._reasoning_tokens += len(tokens)
            case TurnDone(reason):
                self._finish_reason = reason
            case _:
                pass


def harmony_engine(model: Model) -> Engine:
    """An engine that never samples reserved or unused ids.

    Raises:
        VocabularyError: The model has not the rows of the gpt-oss vocabulary.
    """
    vocabulary = load_vocabulary()
    if model.config.vocab_size != vocabulary.n_vocab:
        raise VocabularyError(
            f"vocab_size: expected {vocabulary.n_vocab}, the vocabulary of gpt-oss, got "
            f"{model.config.vocab_size}; this model has no text to offer"
        )
    return Engine(model, allowed=vocabulary.sampleable)
