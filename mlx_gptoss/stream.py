"""The events of one turn on their way from the owner thread to whoever asked.

While an outbox is full, its turn is advanced only if others wait for its place, so a slow reader
never holds up another's turn. What nobody can read any more is cancelled: a stream that is dropped
gives everything back.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue

from mlx_gptoss.errors import RuntimeClosedError
from mlx_gptoss.harmony import Event
from mlx_gptoss.turn import Reply

CAPACITY = 64  # events; a token gives one or two

Item = Event | Reply | BaseException


class Outbox:
    """Between one turn and one reader; every method may be called from any thread.

    Args:
        wake: Makes the owner look at this turn again; must not block or take a lock.

    Attributes:
        cancelled: The reader wants no more.
    """

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._process = os.getpid()
        self.cancelled = False
        self.notify: Callable[[], None] = lambda: None

    @property
    def is_full(self) -> bool:
        """Whether the reader does not keep up."""
        return self._items.qsize() >= CAPACITY

    def put(self, item: Item) -> None:
        """Add an event, or what ends the turn: its reply or an error."""
        self._items.put(item)
        try:
            self.notify()
        except RuntimeError:  # the reader's event loop is gone
            self.cancelled = True

    def check(self) -> None:
        """Raise `RuntimeClosedError` in a process that was forked from the outbox's."""
        if os.getpid() != self._process:
            raise RuntimeClosedError(FORKED)

    def take(self, *, block: bool) -> Item:
        """The next item, for one taker at a time.

        Raises:
            queue.Empty: There is none, and `block` is false.
        """
        item = self._items.get(block)
        if self._items.qsize() == CAPACITY - 1:
            self._wake()
        return item

    def cancel(self) -> None:
        """Stop the turn within one token, or one chunk of its prompt, and wake its reader."""
        self.cancelled = True
        self._wake()
        self.put(GeneratorExit())  # a cancelled turn may have nothing more to say


FORKED = (
    "runtime: opened in another process, which this one was forked from; its thread and its GPU "
    "work stayed there; open a runtime after the fork"
)


class Stream(Iterator[Event]):
    """The events of a turn, as they happen; made by `Runtime.stream`.

    Closing it, leaving its `with` block or dropping it cancels the turn. Any thread may close it,
    also while another waits for an event: to that one, the events end. Several threads may read it:
    each event goes to one of them, the end to all.
    """

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._reading = threading.Lock()
        self._reply: Reply | None = None
        self._over = False

    def __next__(self) -> Event:
        self._outbox.check()  # first: a fork may have copied the lock while it was held
        with self._reading:
            if self._over:
                raise StopIteration
            item = self._outbox.take(block=True)
            if self._over:  # closed meanwhile
                raise StopIteration
            if isinstance(item, Reply | BaseException):
                self._end(item)
                raise StopIteration
            return item

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not done; does nothing after the end."""
        if not self._over:
            self._over = True
            self._outbox.cancel()

    def reply(self) -> Reply:
        """Wait for the end and sum the turn up.

        Raises:
            ValueError: The stream was closed before its end.
        """
        for _ in self:
            pass
        return _required(self._reply)

    def _end(self, item: Reply | BaseException) -> None:
        self._over = True
        if isinstance(item, BaseException):
            raise item
        self._reply = item


class AsyncStream(AsyncIterator[Event]):
    """`Stream` for one event loop and any of its tasks; made by `Runtime.astream`."""

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._reading = asyncio.Lock()
        self._reply: Reply | None = None
        self._over = False
        self._arrived: asyncio.Event | None = None

    async def __anext__(self) -> Event:
        self._outbox.check()
        async with self._reading:
            if self._over:
                raise StopAsyncIteration
            item = await self._take()
            if self._over:  # closed meanwhile, by another task
                raise StopAsyncIteration
            if isinstance(item, Reply | BaseException):
                self._over = True
                if isinstance(item, BaseException):
                    raise item
                self._reply = item
                raise StopAsyncIteration
            return item

    async def _take(self) -> Item:
        if self._arrived is None:
            arrived, loop = asyncio.Event(), asyncio.get_running_loop()
            self._outbox.notify = lambda: loop.call_soon_threadsafe(arrived.set) and None
            self._arrived = arrived
        while True:
            self._arrived.clear()  # before looking, so that what comes after is not missed
            try:
                return self._outbox.take(block=False)
            except Empty:
                await self._arrived.wait()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._over:
            self._outbox.cancel()

    async def aclose(self) -> None:
        """Cancel what is not done; does nothing after the end."""
        if not self._over:
            self._over = True
            self._outbox.cancel()

    async def reply(self) -> Reply:
        """Wait for the end and sum the turn up.

        Raises:
            ValueError: The stream was closed before its end.
        """
        async for _ in self:
            pass
        return _required(self._reply)


def _required(reply: Reply | None) -> Reply:
    if reply is None:
        raise ValueError("stream: expected one read to its end, got one closed or failed before")
    return reply
