"""The thread that owns the model: it alone touches MLX, and it lets turns take turns.

Several turns run at once, each with its own cache. In every round all of those that write take one
step together, which reads the weights once, and one of those that still read their prompt is fed
one chunk: so no prompt, however long, holds the others up for more than that. A turn comes and goes
between two rounds, and gives the tokens that it gives alone.

A turn whose reader does not keep up stands still, unless others wait for its place or its memory:
then it goes on to its end, or a stream that nobody reads would make them wait for ever.

MLX keeps a default stream for each thread, so even loading happens here.
"""

import atexit
import contextlib
import gc
import logging
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import mlx.core as mx

from mlx_gptoss.cache_folder import CacheFolder, Found
from mlx_gptoss.engine import Engine
from mlx_gptoss.errors import RuntimeClosedError
from mlx_gptoss.memory import Memory
from mlx_gptoss.model import Model
from mlx_gptoss.prefix_cache import PrefixCache
from mlx_gptoss.stream import FORKED
from mlx_gptoss.task import Running, Task

log = logging.getLogger("mlx_gptoss")

CLOSED = "runtime: closed; open another one"
FAILED = (
    "runtime: ended by a fault of its own, {}: {}; its traceback is in the log; open another one"
)


@dataclass(frozen=True)
class _Arriving:
    """A task that has its place, while files are searched for the beginning of its prompt."""

    task: Task
    search: Future[Found | None]


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
        self._fault: BaseException | None = None
        self._inbox: SimpleQueue[Task | None] = SimpleQueue()
        self._waiting: deque[Task] = deque()
        self._arriving: list[_Arriving] = []
        self._running: list[Running] = []
        self._rounds = 0
        loaded: Future[None] = Future()
        # daemon: an app that forgets to close must still be able to end
        self._thread = threading.Thread(
            target=self._main, args=(load, loaded), name="mlx-gptoss", daemon=True
        )
        self._thread.start()
        try:
            loaded.result()
        except BaseException:
            self._closed = True  # also if this was interrupted: nobody has the model then
            self.wake()
            raise
        atexit.register(self.close)  # else Python would end the thread amid MLX, and abort

    def wake(self) -> None:
        """Make the thread look around; takes no lock, so that a finalizer may call it."""
        self._inbox.put(None)

    def check(self) -> None:
        """Raise `RuntimeClosedError` unless tasks can be given."""
        if os.getpid() != self._process:
            raise RuntimeClosedError(FORKED)
        if self._closed:
            raise self._ended()

    def submit(self, task: Task) -> None:
        """Give a task; its outbox tells the rest.

        Raises:
            RuntimeClosedError: Closed, or of another process.
        """
        with self._lock:
            self.check()
            self._inbox.put(task)

    def _ended(self) -> RuntimeClosedError:
        """Why nothing can be done any more; another error for each caller."""
        if self._fault is None:
            return RuntimeClosedError(CLOSED)
        error = RuntimeClosedError(FAILED.format(type(self._fault).__name__, self._fault))
        error.__cause__ = self._fault
        return error

    def close(self) -> None:
        """Cancel everything, free the memory, end the thread; does nothing the second time."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.close)

    def _main(self, load: Callable[[], Engine], loaded: "Future[None]") -> None:
        try:
            engine = load()
            files = self._files(engine.model) if self._files else None
            self._prefixes = PrefixCache(
                engine.model.make_cache, budget_bytes=self._cache_bytes, files=files
            )
        except BaseException as error:
            self._closed = True
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while not self._closed:
                self._admit(engine)  # for places that came free
                self._receive()
                self._admit(engine)  # of those that came
                self._go_round(engine)
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            log.exception("the runtime ends by a fault of its own")
            traceback.clear_frames(error.__traceback__)  # they hold the model and its caches
            self._fault = error
        finally:
            self._end()
            self._prefixes.close()
            del self._prefixes, engine, load
            gc.collect()
            mx.clear_cache()

    def _receive(self) -> None:
        """Take what came; wait for something if there is nothing to do."""
        idle = not any(r.task.outbox.cancelled or self._may_go_on(r) for r in self._running)
        with contextlib.suppress(Empty):
            item = self._inbox.get(block=idle)
            while True:
                if item is not None:
                    self._waiting.append(item)
                item = self._inbox.get(block=False)

    def _admit(self, engine: Engine) -> None:
        """Give places to waiting tasks in their order, and start those whose files are read."""
        self._waiting = deque(task for task in self._waiting if not task.outbox.cancelled)
        while self._waiting and len(self._arriving) + len(self._running) < self._concurrent:
            task = self._waiting[0]
            try:
                if not self._has_room(task):
                    break
                self._seat(task, engine)
            except Exception as error:
                task.outbox.put(error)
            self._waiting.popleft()
        for arriving in [arriving for arriving in self._arriving if arriving.search.done()]:
            self._arriving.remove(arriving)
            if not arriving.task.outbox.cancelled:
                self._start(arriving, engine)

    def _seat(self, task: Task, engine: Engine) -> None:
        """Have files searched for a task, and start it if that needs no time."""
        arriving = _Arriving(task, self._prefixes.search(task.prompt, head=task.head))
        if arriving.search.done():
            self._start(arriving, engine)
        else:
            self._arriving.append(arriving)
            arriving.search.add_done_callback(lambda _: self.wake())

    def _start(self, arriving: _Arriving, engine: Engine) -> None:
        try:
            found = arriving.search.result()
            self._running.append(Running(arriving.task, engine, self._prefixes, found=found))
        except Exception as error:
            arriving.task.outbox.put(error)

    def _has_room(self, task: Task) -> bool:
        """Whether a task fits beside the running ones; idle conversations make room for it."""
        if self._memory is None:
            return True
        contexts = [other.task.context for other in (*self._arriving, *self._running)]
        free = self._memory.free_bytes([*contexts, task.context])
        if free < 0 and contexts:
            return False
        self._prefixes.make_room(
            task.prompt.tokens,
            turn_bytes=self._memory.turn_bytes(task.context),
            budget_bytes=max(free, 0),
        )
        return True

    def _may_go_on(self, running: Running) -> bool:
        """Whether a turn's reader keeps up, or others wait for what it holds."""
        return bool(self._waiting) or not running.task.outbox.is_full

    def _go_round(self, engine: Engine) -> None:
        """One token of every turn that writes, one chunk of one prompt; see the module."""
        self._rounds += 1
        for running in [r for r in self._running if r.task.outbox.cancelled]:
            self._advance(running, running.leave)
        ready = [running for running in self._running if self._may_go_on(running)]
        writing = [running for running in ready if not running.reads]
        engine.launch([running.turn.generation for running in writing])
        for running in writing:
            self._advance(running, running.write)
        reading = [running for running in ready if running.reads]
        if reading:
            next_one = min(reading, key=lambda running: running.fed_in)
            next_one.fed_in = self._rounds
            self._advance(next_one, next_one.feed)

    def _advance(self, running: Running, step: Callable[[], bool]) -> None:
        try:
            if step():
                return
        except Exception as error:  # of this turn alone; its cache is dropped
            running.task.outbox.put(error)
        self._running.remove(running)

    def _end(self) -> None:
        """Tell everybody who waits."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(Empty):
            while True:
                if item := self._inbox.get(block=False):
                    self._waiting.append(item)
        begun = (one.task for one in (*self._running, *self._arriving))
        for task in (*begun, *self._waiting):
            task.outbox.put(self._ended())
        self._arriving.clear()
        self._waiting.clear()
        try:
            for running in self._running:
                running.turn.generation.close()
            mx.synchronize()
        except Exception:  # of the device; everybody is told, and the rest is to be freed
            log.exception("the runtime could not end the work that was begun")
        self._running.clear()
