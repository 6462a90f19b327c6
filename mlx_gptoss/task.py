"""A turn as the owner thread works at it: what was asked for, and what is there of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from mlx_gptoss.cache_folder import Found
from mlx_gptoss.engine import Engine
from mlx_gptoss.harmony.ledger import Prompt
from mlx_gptoss.prefix_cache import PrefixCache, Slot
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.steps import Guide
from mlx_gptoss.stream import Outbox
from mlx_gptoss.turn import Turn


@dataclass(frozen=True, kw_only=True)
class Task:
    """A turn to be made.

    Attributes:
        prompt: Its tokens.
        head: Length of the instructions at its beginning, in tokens.
        recipients: Tools that may be called.
        sampling: How to choose tokens.
        max_tokens: Most tokens of the answer.
        context: Tokens to reserve memory for.
        guide: Holds the turn to a schema; None lets it be.
        outbox: Takes the events, and then a `Reply` or an error.
        on_prefill: Told, in the thread, how many tokens of the prompt are read, and how many will.
    """

    prompt: Prompt
    head: int
    recipients: Mapping[str, str]
    sampling: SamplingParams
    max_tokens: int | None
    context: int
    guide: Guide | None
    outbox: Outbox
    on_prefill: Callable[[int, int], None] | None = None


class Running:
    """A task at work.

    Attributes:
        reads: Its prompt is not fed yet.
        fed_in: The last round in which it was fed a chunk.
    """

    def __init__(self, task: Task, engine: Engine, prefixes: PrefixCache, *, found: Found | None):
        self.task = task
        self.slot: Slot = prefixes.take(task.prompt, head=task.head, found=found)
        self._prefixes = prefixes
        self.reads, self.fed_in = True, 0
        self.turn = Turn(
            engine,
            task.prompt.tokens,
            sampling=task.sampling,
            max_tokens=task.max_tokens,
            recipients=task.recipients,
            cache=self.slot.cache,
            breaks=self.slot.marks,
            guide=task.guide,
            # no method of ours: the turn would hold us, and we the turn, with all its memory
            on_prefill=partial(_note_chunk, task, self.slot, prefixes),
        )

    def feed(self) -> bool:
        """Feed one chunk of the prompt; whether the turn goes on, as in the methods below."""
        self.reads = self.turn.generation.feed()
        return True

    def write(self) -> bool:
        """Tell what the next token says."""
        for event in self.turn.advance():
            self.task.outbox.put(event)
        return self.leave() if self.turn.is_over else True

    def leave(self) -> bool:
        """Give the cache back, and the reply of a turn that is over and not cancelled."""
        self.turn.generation.close()
        self.slot.note((*self.task.prompt.tokens, *self.turn.tokens))
        self._prefixes.give_back(self.slot)
        if self.turn.is_over:
            self.task.outbox.put(self.turn.reply())
        return False


def _note_chunk(task: Task, slot: Slot, prefixes: PrefixCache, done: int, total: int) -> None:
    prefixes.note(slot, task.prompt, head=task.head)
    if task.on_prefill is not None:
        task.on_prefill(done, total)
