"""What a generation cost: tokens, times, memory."""

import time
from dataclasses import dataclass

import mlx.core as mx


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


class Meter:
    """Counts and times the tokens of one generation, from now on.

    Args:
        prompt_tokens: Of the whole prompt.
        cached_tokens: Of it, already in the cache.
    """

    def __init__(self, prompt_tokens: int, cached_tokens: int) -> None:
        self._prompt, self.cached_tokens = prompt_tokens, cached_tokens
        self.emitted = 0
        self._began = self._first_at = self._last_at = time.perf_counter()

    def note_token(self) -> None:
        """The host has one more token."""
        self.emitted += 1
        self._last_at = time.perf_counter()
        if self.emitted == 1:
            self._first_at = self._last_at

    @property
    def stats(self) -> GenerationStats:
        """What it cost so far."""
        began, first, n = self._began, self._first_at, self.emitted
        fed = self._prompt - self.cached_tokens
        return GenerationStats(
            prompt_tokens=self._prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=n,
            ttft_s=first - began if n else None,
            prefill_tok_per_s=fed / (first - began) if n else None,
            decode_tok_per_s=(n - 1) / (self._last_at - first) if n > 1 else None,
            peak_memory_bytes=mx.get_peak_memory(),
        )
