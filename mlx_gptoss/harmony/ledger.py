"""Which tokens of a prompt a K,V cache already holds, and where it can go back to.

A cache of gpt-oss can be continued, but not shortened at will: its sliding layers keep the last 128
positions only, so it can return just to positions where those were saved. This module does the
book-keeping, without the arrays:

    Prompt        a conversation's tokens, where its messages end, and how much of it will stand in
                  the prompts of all later turns (old analysis is dropped, so not all of it)
    TokenLedger   what one cache was fed, its saved positions, and the best start for a prompt
    PrefixStore   saved states by the tokens that lead to them, shared by conversations, bounded
                  in bytes

The place to save is `Prompt.stable`: after the next question the reasoning behind this answer is
gone, and everything up to there is what both prompts share.

What a saved state is, is the caller's business (type variable S): ours holds MLX arrays.
"""

import hashlib
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlx_gptoss.harmony.messages import Message, Role
from mlx_gptoss.harmony.render import (
    DEFAULT_OPTIONS,
    OldAnalysis,
    RenderOptions,
    has_function_tools,
    is_reasoning,
    render_message,
    without_old_analysis,
)
from mlx_gptoss.vocabulary import Special, load_vocabulary

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, with its structure.

    Attributes:
        tokens: those of `render_conversation_for_completion`.
        ends: position after each message that was rendered, in order.
        stable: position after the last message that no later turn will drop or follow with
            something else: later prompts of this conversation begin with `tokens[:stable]`.
    """

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    stable: int


def prepare_prompt(
    messages: Iterable[Message],
    *,
    role: Role = Role.ASSISTANT,
    options: RenderOptions = DEFAULT_OPTIONS,
) -> Prompt:
    """Return the prompt that lets `role` write the next message.

    `stable` holds for conversations that go on from here under the same options; one that changes
    an earlier message, or declares its first function later, begins with other tokens.

    Raises:
        HarmonyError: a message cannot be rendered; see `render_message`.
    """
    messages = list(messages)
    functions = has_function_tools(messages)
    drops = options.old_analysis is OldAnalysis.DROP
    kept = without_old_analysis(messages) if drops else messages
    tokens: list[int] = []
    ends: list[int] = []
    stable = None
    for message in kept:
        if drops and stable is None and is_reasoning(message):
            stable = len(tokens)
        tokens += render_message(message, has_functions=functions, options=options)
        ends.append(len(tokens))
    if stable is None:
        stable = len(tokens)
    tokens += [int(Special.START), *load_vocabulary().encode(role)]
    return Prompt(tokens=tuple(tokens), ends=tuple(ends), stable=stable)


@dataclass(frozen=True)
class Start(Generic[S]):
    """Where a prompt can start: the first `length` tokens need no computing.

    Attributes:
        length: how many tokens of the prompt the state holds; less than the prompt has, because
            its last token must be fed for the first logits.
        state: the saved state to go back to; None to go on from where the cache is, or, with
            `length` 0, to begin with an empty one.
    """

    length: int
    state: S | None


class TokenLedger(Generic[S]):
    """What one cache was fed, token by token, and the positions whose state was saved.

    Attributes:
        tokens: everything the cache holds, in order; a sampled token counts once it was fed.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._positions: list[int] = []
        self._states: dict[int, S] = {}

    @property
    def positions(self) -> tuple[int, ...]:
        """The saved positions, ascending."""
        return tuple(self._positions)

    @property
    def states(self) -> Mapping[int, S]:
        """The saved states by their positions."""
        return self._states

    def feed(self, tokens: Iterable[int]) -> None:
        """Note that the cache was fed these tokens."""
        self.tokens += tokens

    def save(self, state: S) -> None:
        """Note the cache's state at the current position; a second one there replaces the first."""
        position = len(self.tokens)
        if position not in self._states:
            insort(self._positions, position)
        self._states[position] = state

    def forget(self, position: int) -> S:
        """Give up a saved position and return its state.

        Raises:
            KeyError: nothing was saved there.
        """
        state = self._states.pop(position)
        self._positions.remove(position)
        return state

    def best_start(self, prompt: Sequence[int]) -> Start[S]:
        """Return the start that leaves the fewest tokens of a prompt to compute.

        Raises:
            ValueError: the prompt is empty.
        """
        if not prompt:
            raise ValueError("prompt: expected at least one token, got none")
        common = common_prefix(self.tokens, prompt)
        if common == len(self.tokens) < len(prompt):
            return Start(common, None)
        longest = min(common, len(prompt) - 1)
        place = bisect_left(self._positions, longest + 1)
        if not place:
            return Start(0, None)
        position = self._positions[place - 1]
        return Start(position, self._states[position])

    def rewind(self, start: Start[S]) -> None:
        """Note that the cache went back to a start that `best_start` returned.

        Saved positions after it are forgotten: what led to them is gone.
        """
        del self.tokens[start.length :]
        while self._positions and self._positions[-1] > start.length:
            del self._states[self._positions.pop()]


class PrefixStore(Generic[S]):
    """Saved states by the tokens that lead to them, for every conversation; the oldest go first.

    Not safe in several threads: it belongs to the thread that owns the model.

    Args:
        budget_bytes: most bytes of all states together.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[bytes, tuple[int, S, int]] = OrderedDict()  # length, state, size
        self._lengths: dict[int, int] = {}  # how many entries have a length

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tokens: Sequence[int], state: S, *, size_bytes: int) -> bool:
        """Keep the state that these tokens lead to; the least recently used make room.

        Returns:
            Whether it was kept: a state larger than the whole budget is not.
        """
        (key,) = _digests(tokens, [len(tokens)])
        self._remove(key)
        if size_bytes > self.budget_bytes:
            return False
        while self.used_bytes + size_bytes > self.budget_bytes:
            self._remove(next(iter(self._entries)))
        self._entries[key] = (len(tokens), state, size_bytes)
        self._lengths[len(tokens)] = self._lengths.get(len(tokens), 0) + 1
        self.used_bytes += size_bytes
        return True

    def best_start(self, prompt: Sequence[int]) -> Start[S]:
        """Return the longest kept start of a prompt, and mark it as used."""
        lengths = sorted(length for length in self._lengths if length < len(prompt))
        for key in reversed(_digests(prompt, lengths)):
            if key in self._entries:
                self._entries.move_to_end(key)
                length, state, _ = self._entries[key]
                return Start(length, state)
        return Start(0, None)

    def clear(self) -> None:
        """Give up every state."""
        self._entries.clear()
        self._lengths.clear()
        self.used_bytes = 0

    def _remove(self, key: bytes) -> None:
        if key not in self._entries:
            return
        length, _, size_bytes = self._entries.pop(key)
        self.used_bytes -= size_bytes
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # compares slices, which is fast, instead of tokens one by one
        middle = (low + high + 1) // 2
        if list(first[low:middle]) == list(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _digests(tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Return a key of `tokens[:length]` for each of ascending lengths, in one pass."""
    hashed, done, keys = hashlib.blake2b(digest_size=16), 0, []
    for length in lengths:
        hashed.update(array("q", tokens[done:length]).tobytes())
        keys.append(hashed.copy().digest())
        done = length
    return keys
