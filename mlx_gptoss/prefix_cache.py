"""The K,V caches of conversations between their turns, and the shared beginnings of their prompts.

A slot is the cache of one conversation with the ledger of what it was fed. Going back in a slot
needs the sliding layers' rings as they were (the full layers are just cut), so rings are saved
where later prompts branch off: behind the instructions, and behind the newest question, because
the reasoning that follows it is dropped in the next turn. What a turn then computes is what really
changed, and what it reuses is bit for bit what was computed.

A conversation that begins with instructions seen before starts from a copy of their K,V.

With a `CacheFolder`, what is kept is also written there, and a prompt that begins with more than is
in memory starts from a file.

All of this belongs to the thread that owns the model, but for the reading of files, which goes on
beside it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_gptoss.cache import (
    RECENT,
    FullCache,
    FullSnapshot,
    ModelCache,
    ModelSnapshot,
    WindowCache,
    WindowSnapshot,
)
from mlx_gptoss.cache_files import Content
from mlx_gptoss.cache_folder import CacheFolder, Found, Saved
from mlx_gptoss.harmony.ledger import PrefixStore, Prompt, Start, TokenLedger
from mlx_gptoss.plan import MOST_SAVED

SHARED_PART = 4  # one in so many bytes of the budget is for shared beginnings


@dataclass(frozen=True)
class Rings:
    """The sliding layers at one position; holds their arrays, copies nothing."""

    windows: tuple[WindowSnapshot, ...]

    @classmethod
    def of(cls, cache: ModelCache) -> "Rings":
        """The rings of a cache as they are now."""
        return cls(tuple(a.snapshot() for a in cache if isinstance(a, WindowCache)))

    @property
    def nbytes(self) -> int:
        """Size of the rings, in bytes."""
        return sum(ring.keys.nbytes + ring.values.nbytes for ring in self.windows)


@dataclass
class Slot:
    """One conversation's cache.

    Attributes:
        cache: The arrays.
        ledger: What they were fed, and where the cache can go back to.
        marks: Positions of the present prompt at which rings are saved.
        saved: Its file, which the next one replaces.
    """

    cache: ModelCache
    ledger: TokenLedger[Rings] = field(default_factory=TokenLedger[Rings])
    marks: tuple[int, ...] = ()
    saved: Saved | None = None

    @property
    def nbytes(self) -> int:
        """Size of the cache and of everything saved, in bytes."""
        return self.cache.nbytes + sum(rings.nbytes for rings in self.ledger.states.values())

    def go_to(self, length: int, state: Rings | None) -> None:
        """Go back to a start that the ledger returned."""
        if length < max(self.ledger.positions, default=0):
            self.saved = None  # what is dropped can be gone back to there
        if state is not None:
            windows = iter(state.windows)
            for layer in self.cache:
                if isinstance(layer, WindowCache):
                    layer.restore(next(windows))
                else:
                    layer.trim(layer.offset - length)

    def content(self) -> Content:
        """What a file of it holds; the long stores take in what is in the short ones."""
        for layer in self.cache:
            if isinstance(layer, FullCache):
                layer.freeze()
        windows = {position: rings.windows for position, rings in self.ledger.states.items()}
        return Content.of(self.ledger.tokens, self.cache.snapshot().layers, windows)

    def note(self, tokens: Sequence[int]) -> None:
        """Note that the cache was fed `tokens` up to its offset, and save the rings at a mark."""
        at = self.cache.offset
        self.ledger.feed(tokens[len(self.ledger.tokens) : at])
        if at in self.marks:
            self.ledger.save(Rings.of(self.cache))
            if len(self.ledger.positions) > MOST_SAVED:
                self.ledger.forget(self.ledger.positions[1])


class PrefixCache:
    """Finds the longest reusable beginning of a prompt.

    Args:
        make_cache: Makes an empty cache of the model.
        budget_bytes: Most bytes kept in memory between turns; 0 keeps nothing.
        files: Keeps what is kept beyond this process too.
    """

    def __init__(
        self,
        make_cache: Callable[[], ModelCache],
        *,
        budget_bytes: int,
        files: CacheFolder | None = None,
    ):
        self._make_cache, self._files = make_cache, files
        self._sliding = [isinstance(layer, WindowCache) for layer in make_cache()] if files else []
        self._idle: list[Slot] = []  # the last one was used last
        self._shared = PrefixStore[ModelSnapshot](budget_bytes // SHARED_PART)
        self._budget_bytes = budget_bytes

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return self._shared.used_bytes + sum(slot.nbytes for slot in self._idle)

    def search(self, prompt: Prompt, *, head: int) -> Future[Found | None]:
        """Begin to look for more of a prompt in files than is in memory.

        Args:
            prompt: Of the next turn.
            head: Length of its instructions.

        Returns:
            What `take` is given once it is there.
        """
        if self._files is None:
            nothing = Future[Found | None]()
            nothing.set_result(None)
            return nothing
        had = self._had(prompt.tokens, head)
        return self._files.search(prompt.tokens, more_than=had, sliding=self._sliding)

    def take(self, prompt: Prompt, *, head: int, found: Found | None = None) -> Slot:
        """A slot whose cache holds as much of a prompt as can be reused.

        Args:
            prompt: Of the next turn.
            head: Length of its instructions, which other conversations may share; 0 if none.
            found: What `search` found.

        Returns:
            The slot, the caller's until `give_back`.
        """
        tokens = prompt.tokens
        idle = self._best_idle(tokens)
        if found is not None and found.state.length > self._had(tokens, head):
            slot = self._loaded(tokens, found)
            if slot.cache.offset == head:
                slot.ledger.save(Rings.of(slot.cache))
                self._share(slot)
        elif idle:
            slot, start = idle
            self._idle.remove(slot)
            slot.go_to(start.length, start.state)
            slot.ledger.rewind(start)
        else:
            slot = Slot(self._make_cache())
            shared = self._shared.best_start(tokens)
            if shared.state is not None:
                slot.cache.restore(shared.state)
                slot.ledger.feed(tokens[: shared.length])
                slot.ledger.save(Rings.of(slot.cache))
        slot.marks = (head, prompt.stable) if self._budget_bytes or self._files else ()
        return slot

    def _had(self, tokens: Sequence[int], head: int) -> int:
        """How much of a prompt is in memory, in tokens."""
        shared, idle = self._shared.best_start(tokens), self._best_idle(tokens)
        # On a tie the copy: a slot that has only the instructions in common is another's.
        had = idle[1].length if idle else 0
        return max(shared.length, had if had > head else had - 1)

    def note(self, slot: Slot, prompt: Prompt, *, head: int) -> None:
        """Note that more of a prompt was fed to a slot; others may go on from its instructions."""
        slot.note(prompt.tokens)
        if slot.cache.offset == head:
            self._share(slot)

    def _share(self, slot: Slot) -> None:
        """Keep a copy of everything a slot holds for other conversations."""
        snapshot, tokens = _compact(slot.cache), slot.ledger.tokens
        nbytes = sum(a.nbytes for layer in snapshot.layers for a in _arrays(layer))
        self._shared.put(tokens, snapshot, size_bytes=nbytes)
        if self._files is not None:
            self._files.save_shared(Content.of(tokens, snapshot.layers, {}))

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for its conversation's next turn; the least recently used make room."""
        if self._files is not None and slot.ledger.tokens:
            slot.saved = self._files.save(slot.content(), replaces=slot.saved)
        self._idle.append(slot)
        self._keep(self._budget_bytes)

    def make_room(self, prompt: Sequence[int], *, turn_bytes: int, budget_bytes: int) -> None:
        """Give up idle conversations, the oldest first, then the rest, before a turn begins.

        What waits to be written counts too: where it does not fit, this waits for the disk.

        Args:
            prompt: Of the turn.
            turn_bytes: Reserved for its cache; so what is kept of it does not count, if it fits.
            budget_bytes: Most bytes of everything else.
        """
        idle = self._best_idle(prompt)
        own = [idle[0]] if idle and idle[0].nbytes <= turn_bytes else []
        self._idle = [slot for slot in self._idle if slot not in own]
        self._keep(budget_bytes)
        if self._files is not None and self.nbytes + self._files.waiting_bytes > budget_bytes:
            self._files.flush()
        self._idle += own

    def close(self) -> None:
        """Give up everything in memory; what waits to be written is."""
        self._idle.clear()
        self._shared.clear()
        if self._files is not None:
            self._files.close()

    def _keep(self, budget_bytes: int) -> None:
        while self._idle and self.nbytes > budget_bytes:
            self._idle.pop(0)
        if self.nbytes > budget_bytes:
            self._shared.clear()

    def _best_idle(self, tokens: Sequence[int]) -> tuple[Slot, Start[Rings]] | None:
        """The idle slot that begins with most of a prompt, if with more than is shared."""
        starts = [(slot, slot.ledger.best_start(tokens)) for slot in self._idle]
        best = max(starts, key=lambda found: found[1].length, default=None)
        if best is None or best[1].length <= self._shared.best_start(tokens).length:
            return None
        return best

    def _loaded(self, tokens: Sequence[int], found: Found) -> Slot:
        """A slot from what was read of a file."""
        slot = Slot(self._make_cache(), saved=found.saved)
        windows = found.state.fill(slot.cache)
        for position in sorted(windows):
            slot.ledger.feed(tokens[len(slot.ledger.tokens) : position])
            slot.ledger.save(Rings(windows[position]))
        slot.ledger.feed(tokens[len(slot.ledger.tokens) : found.state.length])
        return slot


def _compact(cache: ModelCache) -> ModelSnapshot:
    """A snapshot with long stores of their exact length, which the cache does not share."""
    layers = []
    for layer in cache:
        if isinstance(layer, FullCache):
            keys, values = (mx.contiguous(a[:, :, : layer.offset]) for a in layer.freeze())
            batch, heads, _, head_dim = keys.shape
            empty = mx.zeros((batch, heads, RECENT, head_dim), keys.dtype)
            layers.append(FullSnapshot((keys, values), (empty, empty), layer.offset, 0))
        else:
            layers.append(layer.snapshot())
    snapshot = ModelSnapshot(tuple(layers), cache.left_padding)
    mx.eval([a for layer in layers for a in _arrays(layer)])
    return snapshot


def _arrays(layer: WindowSnapshot | FullSnapshot) -> tuple[mx.array, ...]:
    if isinstance(layer, WindowSnapshot):
        return layer.keys, layer.values
    return *layer.frozen, *layer.recent
