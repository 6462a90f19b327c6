"""One conversation in a background thread, for any user interface that polls a queue.

The thread runs an event loop in which the model's turns are tasks; the interface's own thread only
calls the methods below and takes what happened from `events`, so it never waits for the model.
`stop` cancels the task: the model stops within one token, or one chunk of a long prompt.
"""

import asyncio
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

from mlx_gptoss import Reply, Runtime, SamplingParams
from mlx_gptoss.harmony import Event, Message, ReasoningEffort, TextDelta, assistant, user


@dataclass(frozen=True)
class Opened:
    """The model is in memory; before, and after an error without it, nothing can be asked."""


@dataclass(frozen=True)
class Stopped:
    """A turn ended by `stop`."""


Happening = Opened | Event | Reply | Stopped | Exception
Events = SimpleQueue[Happening]


class BackgroundChat:
    """A conversation with a model.

    Args:
        model: See `Runtime.open`.
        sampling: How to choose tokens.

    Attributes:
        events: What happened since `reset`: `Opened` once, then for each turn the runtime's events
            and, last, its `Reply`, `Stopped` or an exception.
    """

    def __init__(self, model: str, *, sampling: SamplingParams | None = None):
        self.events: Events = SimpleQueue()
        self._messages: list[Message] = []
        self._sampling = sampling
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = Thread(target=self._main, args=(model,), name="chat")
        self._thread.start()

    def ask(self, text: str, *, reasoning: ReasoningEffort) -> None:
        """Start a turn; call it when the one before is over."""
        self._loop.call_soon_threadsafe(self._start, text, reasoning, self._messages, self.events)

    def stop(self) -> None:
        """Cancel the turn; what was said so far stays in the conversation."""
        self._loop.call_soon_threadsafe(self._cancel)

    def reset(self) -> None:
        """Cancel the turn and begin a new conversation."""
        self.stop()
        self._messages, self.events = [], SimpleQueue()  # a turn that is ending keeps the old ones

    def take(self) -> list[Happening]:
        """What happened since the last call."""
        taken = []
        try:
            while True:
                taken.append(self.events.get(block=False))
        except Empty:
            return taken

    def close(self) -> None:
        """Cancel the turn, free the model and end the thread; waits for a model that is opening."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
            self._loop.close()

    def _main(self, model: str) -> None:
        try:
            with (
                Runtime.open(model) as self._runtime,
                asyncio.Runner(loop_factory=lambda: self._loop) as runner,
            ):
                self.events.put(Opened())
                runner.run(self._closing.wait())  # and then cancels what is not done
        except Exception as error:
            self.events.put(error)

    def _start(
        self, text: str, reasoning: ReasoningEffort, messages: list[Message], events: Events
    ) -> None:
        def end(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                events.put(Stopped())

        self._task = self._loop.create_task(self._answer(text, reasoning, messages, events))
        self._task.add_done_callback(end)  # runs even if the task was cancelled before it began

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()

    async def _answer(
        self, text: str, reasoning: ReasoningEffort, messages: list[Message], events: Events
    ) -> None:
        messages.append(user(text))
        said = ""
        try:
            async with self._runtime.astream(
                messages, reasoning=reasoning, sampling=self._sampling
            ) as stream:
                async for event in stream:
                    said += event.text if isinstance(event, TextDelta) else ""
                    events.put(event)
                reply = await stream.reply()
        except BaseException as error:
            if said:
                messages.append(assistant(said))
            else:
                messages.pop()  # a question without an answer is forgotten
            if not isinstance(error, Exception):
                raise  # cancelled
            events.put(error)
        else:
            messages += reply.messages  # they know their tokens, so the next turn reuses them
            events.put(reply)


def summary(reply: Reply) -> str:
    """What a reply cost, in one line."""
    usage, speed = reply.usage, reply.timing.decode_tok_per_s
    cost = [f"{usage.completion_tokens} tokens"]
    if speed is not None:
        cost.append(f"{speed:.1f} tokens/s")
    cost.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens reused")
    if reply.finish_reason != "stop":
        cost.append("cut off: out of tokens")
    return ", ".join(cost)
