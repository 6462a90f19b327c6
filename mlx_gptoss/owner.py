"""The thread that owns the model: it alone touches MLX, and it lets turns take turns.

Several turns run at once, each with its own cache, token by token in a circle; a prompt counts
chunk by chunk. They share the device's time fairly, but not its work: rows are not batched, so two
turns at once take as long as one after the other, and each gives the tokens that it gives alone.

MLX keeps a default stream for each thread, so even loading happens here.
"""

import contextlib
import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import mlx.core as mx

from mlx_gptoss.cache_folder import CacheFolder
from mlx_gptoss.engine import Engine
from mlx_gptoss.errors import RuntimeClosedError
from mlx_gptoss.harmony.ledger import Prompt
from mlx_gptoss.memory import Memory
from mlx_gptoss.model import Model
from mlx_gptoss.prefix_cache import PrefixCache, Slot
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.steps import Guide
from mlx_gptoss.stream import FORKED, Outbox
from mlx_gptoss.turn import Turn

CLOSED = "runtime: closed; open another one"


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
    """

    prompt: Prompt
    head: int
    recipients: Mapping[str, str]
    sampling: SamplingParams
    max_tokens: int | None
    context: int
    guide: Guide | None
    outbox: Outbox


class _Running:
    """A task at work."""

    def __init__(self, task: Task, engine: Engine, prefixes: PrefixCache):
        self.task = task
        self.slot: Slot = prefixes.take(task.prompt, head=task.head)
        self._prefixes = prefixes
        self._reading = True
        self.turn = Turn(
            engine,
            task.prompt.tokens,
            sampling=task.sampling,
            max_tokens=task.max_tokens,
            recipients=task.recipients,
            cache=self.slot.cache,
            breaks=self.slot.marks,
            guide=task.guide,
            on_prefill=self._note_chunk,
        )

    @property
    def is_ready(self) -> bool:
        return self.task.outbox.cancelled or not self.task.outbox.is_full

    def advance(self) -> bool:
        """Do one chunk of the prompt or one token; say whether more follows."""
        outbox, turn = self.task.outbox, self.turn
        if outbox.cancelled:
            turn.generation.close()
        elif self._reading:
            self._reading = turn.generation.feed()
            return True
        else:
            for event in turn.advance():
                outbox.put(event)
            if not turn.is_over:
                return True
        self.slot.note((*self.task.prompt.tokens, *turn.tokens))
        self._prefixes.give_back(self.slot)
        if turn.is_over:
            outbox.put(turn.reply())
        return False

    def _note_chunk(self, done: int, total: int) -> None:
        self.slot.note(self.task.prompt.tokens)
        if self.slot.cache.offset == self.task.head:
            self._prefixes.share(self.slot)


class Owner:
    """Loads a model in a thread of its own and works off tasks until it is closed.

    Args:
        load: Returns the engine; called in the thread.
        memory: Admission; None admits everything.
        cache_bytes: Budget of `PrefixCache`.
        files: Opens the folder that keeps it beyond the process; None keeps nothing there.
        concurrent: Most turns at once.

    Raises:
        BaseException: What `load` raised.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        memory: Memory | None,
        cache_bytes: int,
        files: Callable[[Model], CacheFolder] | None,
        concurrent: int,
    ):
        self._memory, self._concurrent = memory, concurrent
        self._cache_bytes, self._files = cache_bytes, files
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._inbox: SimpleQueue[Task | None] = SimpleQueue()
        self._waiting: deque[Task] = deque()
        self._running: list[_Running] = []
        loaded: Future[None] = Future()
        # daemon: an app that forgets to close must still be able to end
        self._thread = threading.Thread(
            target=self._main, args=(load, loaded), name="mlx-gptoss", daemon=True
        )
        self._thread.start()
        loaded.result()

    def wake(self) -> None:
        """Make the thread look around; takes no lock, so that a finalizer may call it."""
        self._inbox.put(None)

    def check(self) -> None:
        """Raise `RuntimeClosedError` unless tasks can be given."""
        if os.getpid() != self._process:
            raise RuntimeClosedError(FORKED)
        if self._closed:
            raise RuntimeClosedError(CLOSED)

    def submit(self, task: Task) -> None:
        """Give a task; its outbox tells the rest.

        Raises:
            RuntimeClosedError: Closed, or of another process.
        """
        with self._lock:
            self.check()
            self._inbox.put(task)

    def close(self) -> None:
        """Cancel everything, free the memory, end the thread; does nothing the second time."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self, load: Callable[[], Engine], loaded: "Future[None]") -> None:
        try:
            engine = load()
            files = self._files(engine.model) if self._files else None
        except BaseException as error:
            self._closed = True
            loaded.set_exception(error)
            return
        self._prefixes = PrefixCache(
            engine.model.make_cache, budget_bytes=self._cache_bytes, files=files
        )
        loaded.set_result(None)
        failure: BaseException = RuntimeClosedError(CLOSED)
        try:
            while not self._closed:
                self._admit(engine)
                self._receive()
                self._advance_all()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            failure = error
        finally:
            self._end(failure)
            self._prefixes.close()
            del self._prefixes, engine, load
            gc.collect()
            mx.clear_cache()

    def _receive(self) -> None:
        """Take what came; wait for something if there is nothing to do."""
        idle = not any(running.is_ready for running in self._running)
        with contextlib.suppress(Empty):
            item = self._inbox.get(block=idle)
            while True:
                if item is not None:
                    self._waiting.append(item)
                item = self._inbox.get(block=False)

    def _admit(self, engine: Engine) -> None:
        """Start waiting tasks in their order, as far as there is room."""
        while self._waiting and len(self._running) < self._concurrent:
            task = self._waiting[0]
            if not task.outbox.cancelled and not self._has_room(task):
                return
            self._waiting.popleft()
            if task.outbox.cancelled:
                continue
            try:
                self._running.append(_Running(task, engine, self._prefixes))
            except Exception as error:
                task.outbox.put(error)

    def _has_room(self, task: Task) -> bool:
        """Whether a task fits beside the running ones; idle conversations make room for it."""
        if self._memory is None:
            return True
        contexts = [running.task.context for running in self._running]
        free = self._memory.free_bytes([*contexts, task.context])
        if free < 0 and contexts:
            return False
        self._prefixes.shrink(max(free, 0))
        return True

    def _advance_all(self) -> None:
        """Let every turn whose reader keeps up do one step."""
        for running in [r for r in self._running if r.is_ready]:
            try:
                if running.advance():
                    continue
            except Exception as error:  # of this turn alone; its cache is dropped
                running.task.outbox.put(error)
            self._running.remove(running)

    def _end(self, failure: BaseException) -> None:
        with self._lock:
            self._closed = True
        for running in self._running:
            running.turn.generation.close()
            running.task.outbox.put(failure)
        self._running.clear()
        with contextlib.suppress(Empty):
            while True:
                if item := self._inbox.get(block=False):
                    self._waiting.append(item)
        for task in self._waiting:
            task.outbox.put(failure)
        self._waiting.clear()
        mx.synchronize()
