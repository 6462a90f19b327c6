"""What apps embed: one model, any number of conversations, from any thread or event loop.

    with Runtime.open("demo") as runtime:
        reply = runtime.respond("Why is the sky blue?", reasoning="low", max_tokens=256)
        for event in runtime.stream("And the sea?"):
            ...

Messages are read and rendered in the caller's thread; the model belongs to an owner thread, which
takes the steps of all running turns together. A conversation's next turn reuses the keys and values
of the last one by itself: give the messages so far, with those of `Reply.messages` among them.

The same seed gives the same tokens whether other turns run beside it or not, as long as the prompt
is fed in the same pieces: rounding differs between one long prompt and two halves of it, so a turn
that reuses a cache may differ in the last bits from one that does not (`cache_bytes=0` without a
`cache_dir` reuses none).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlx_gptoss import library, memory, model
from mlx_gptoss.cache_folder import CacheFolder, open_folder
from mlx_gptoss.conversation import Answers, Messages, Tools
from mlx_gptoss.engine import MOST_AT_ONCE, Engine
from mlx_gptoss.harmony import FinishReason, Message, RenderOptions, Schemas, tool_result
from mlx_gptoss.memory import Memory
from mlx_gptoss.owner import Owner
from mlx_gptoss.request import Effort, Intake, Request
from mlx_gptoss.rules import ToolChoice
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.stream import AsyncStream, Stream
from mlx_gptoss.table import EmbeddingPlace
from mlx_gptoss.tools import call, describe
from mlx_gptoss.turn import Reply, harmony_engine

CACHE_BYTES = 2**30  # of keys and values kept between turns; less where memory is short
CONCURRENT = 4  # turns at once; each makes the others slower, though less than its share

ToolSchemas = Literal["openai", "resolved"]


@dataclass(frozen=True, kw_only=True)
class ToolRun:
    """A turn with its tool calls answered.

    Attributes:
        reply: The last reply: an answer, or a call that was one too many.
        messages: Everything that came after the messages given, tools' answers included.
    """

    reply: Reply
    messages: tuple[Message, ...]


class Runtime:
    """A model in memory; see `open`.

    Args:
        load: Returns the engine; called once, in the owner thread.
        admission: Refuses what does not fit the memory; None admits everything.
        cache_bytes: Most bytes of keys and values kept between turns.
        files: Opens the folder that keeps them beyond this process, for the model that was loaded;
            called once, in the owner thread. None keeps them nowhere.
        concurrent: Most turns at once, 1 to 16; others wait in the order they came.
        tool_schemas: See `open`.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        admission: Memory | None = None,
        cache_bytes: int = CACHE_BYTES,
        files: Callable[[model.Model], CacheFolder] | None = None,
        concurrent: int = CONCURRENT,
        tool_schemas: ToolSchemas = "openai",
    ):
        if not 1 <= concurrent <= MOST_AT_ONCE:
            raise ValueError(f"concurrent: expected 1 to {MOST_AT_ONCE}, got {concurrent}")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes: expected a number >= 0, got {cache_bytes}")
        if tool_schemas not in list(Schemas):
            raise ValueError(f"tool_schemas: expected {' or '.join(Schemas)}, got {tool_schemas!r}")
        self._owner = Owner(
            load, memory=admission, cache_bytes=cache_bytes, files=files, concurrent=concurrent
        )
        self._intake = Intake(
            self._owner,
            admission=admission,
            rendering=RenderOptions(schemas=Schemas(tool_schemas)),
        )

    @classmethod
    def open(
        cls,
        name: str = library.DEMO,
        *,
        kernels: Literal["auto", "on", "off"] = "auto",
        cache_bytes: int = CACHE_BYTES,
        cache_dir: str | Path | None = None,
        concurrent: int = CONCURRENT,
        memory_limit_bytes: int | None = None,
        embedding: EmbeddingPlace = "memory",
        tool_schemas: ToolSchemas = "openai",
    ) -> "Runtime":
        """Load a model; close the runtime, or leave its `with` block, to free the memory.

        Args:
            name: "demo", "20b", "120b", a folder, or a hub id that was downloaded.
            kernels: See `load_model`.
            cache_bytes: Most bytes of keys and values kept between turns.
            cache_dir: A folder that keeps them beyond this process, 4 GiB at most, for this model
                on this machine. Its files hold what was said; only their owner can read them.
            concurrent: Most turns at once, 1 to 16; others wait in the order they came.
            memory_limit_bytes: What everything may take; None asks the machine.
            embedding: See `load_model`.
            tool_schemas: How parameters of tools are told to the model: "openai" in the words that
                it was trained on, where `$ref`, `anyOf`, `allOf`, `const` and enumerated numbers
                are lost; "resolved" keeps their meaning, in words that it has seen less of.

        Raises:
            ModelNotFoundError: No such model here; says how to get it.
            MachineError: It does not fit the memory.
            CacheError: `cache_dir` cannot be used.
            GptOssError: The model cannot be loaded; see `load_model`.
        """
        folder, record = library.find_model(name), library.kernel_record()
        load = partial(
            model.load_model, folder, kernels=kernels, embedding=embedding, kernel_record=record
        )
        admission = memory.memory_of(folder, limit_bytes=memory_limit_bytes, embedding=embedding)
        return cls(
            lambda: harmony_engine(load()),
            admission=admission,
            cache_bytes=cache_bytes,
            files=partial(open_folder, cache_dir, folder) if cache_dir is not None else None,
            concurrent=concurrent,
            tool_schemas=tool_schemas,
        )

    def stream(
        self,
        messages: Messages,
        *,
        instructions: str | None = None,
        reasoning: Effort | None = None,
        tools: Tools = (),
        tool_choice: ToolChoice = "auto",
        response_format: Answers | None = None,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Stream:
        """Start a turn; its events arrive as they happen, `TurnDone` last.

        Args:
            messages: A question, or the messages so far, ours or chat dictionaries.
            instructions: The app's own prompt.
            reasoning: How long to think; medium if None.
            tools: What the model may call; the calls of one with `strict` follow its schema.
            tool_choice: "auto", "none", "required" or, as OpenAI writes it, a tool to be called.
            response_format: A schema that the answer then follows.
            max_tokens: Most tokens to write; None: as many as context and memory hold, all of which
                is reserved: where that is all the memory, other turns wait.
            sampling: How to choose tokens; default: temperature 1, nothing filtered.
            on_prefill: Called after each chunk of the prompt with the tokens read and to read, in
                the model's thread: it must be quick, and what it raises ends the turn.

        A turn whose events nobody reads stands still after 64, and holds its place among those at
        once, its cache and its reserved memory. Where others wait for one of them, it goes on to
        its end instead, at their cost, and its events are kept. Dropping the stream cancels it.

        Messages are read and schemas compiled before this returns; the first schema of a
        process takes a second or more.

        Strict tools, another choice than "auto" and a response format need the extra `structured`.
        An answer that `max_tokens` cuts (`FinishReason.LENGTH`) is the beginning of one that
        follows its schema; a call that is cut is none.

        Returns:
            The events; close it to cancel. What goes wrong later is raised while it is read.

        Raises:
            HarmonyError: The messages cannot be understood; see `read_conversation`.
            MachineError: The turn does not fit the memory.
            RuntimeClosedError: The runtime is closed, or was opened before a fork.
            SchemaError: The turn cannot be held to a schema.
            ValueError: `max_tokens` is below 1.
        """
        return Stream(
            self._intake.submit(
                Request(
                    messages=messages,
                    instructions=instructions,
                    reasoning=reasoning,
                    tools=tools,
                    tool_choice=tool_choice,
                    response_format=response_format,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    on_prefill=on_prefill,
                )
            )
        )

    def astream(
        self,
        messages: Messages,
        *,
        instructions: str | None = None,
        reasoning: Effort | None = None,
        tools: Tools = (),
        tool_choice: ToolChoice = "auto",
        response_format: Answers | None = None,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> AsyncStream:
        """`stream` for `async for`, in any event loop.

        Schemas are compiled in a thread of their own, so a `SchemaError` is raised while the
        events are read.
        """
        return AsyncStream(
            self._intake.submit_soon(
                Request(
                    messages=messages,
                    instructions=instructions,
                    reasoning=reasoning,
                    tools=tools,
                    tool_choice=tool_choice,
                    response_format=response_format,
                    max_tokens=max_tokens,
                    sampling=sampling,
                )
            )
        )

    def respond(
        self,
        messages: Messages,
        *,
        instructions: str | None = None,
        reasoning: Effort | None = None,
        tools: Tools = (),
        tool_choice: ToolChoice = "auto",
        response_format: Answers | None = None,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> Reply:
        """`stream` to its end; returns what it came to."""
        turn = self.stream(
            messages,
            instructions=instructions,
            reasoning=reasoning,
            tools=tools,
            tool_choice=tool_choice,
            response_format=response_format,
            max_tokens=max_tokens,
            sampling=sampling,
        )
        with turn as stream:
            return stream.reply()

    async def arespond(
        self,
        messages: Messages,
        *,
        instructions: str | None = None,
        reasoning: Effort | None = None,
        tools: Tools = (),
        tool_choice: ToolChoice = "auto",
        response_format: Answers | None = None,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> Reply:
        """`respond` without blocking the event loop; cancelling the task cancels the turn."""
        turn = self.astream(
            messages,
            instructions=instructions,
            reasoning=reasoning,
            tools=tools,
            tool_choice=tool_choice,
            response_format=response_format,
            max_tokens=max_tokens,
            sampling=sampling,
        )
        async with turn as stream:
            return await stream.reply()

    def run_tools(
        self,
        messages: Sequence[Message | dict[str, Any]] | str,
        functions: Sequence[Callable[..., Any]],
        *,
        instructions: str | None = None,
        reasoning: Effort | None = None,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        max_rounds: int = 8,
    ) -> ToolRun:
        """Respond, calling Python functions for the model until it answers.

        Args:
            messages: As in `stream`, without a system message of our own.
            functions: Documented and annotated; called in the caller's thread. See
                `tools.describe`.
            instructions: See `stream`.
            reasoning: See `stream`.
            max_tokens: Of each reply.
            sampling: See `stream`.
            max_rounds: Most replies.

        Raises:
            HarmonyError: A function cannot be described; else see `stream`.
        """
        if max_rounds < 1:
            raise ValueError(f"max_rounds: expected a number >= 1, got {max_rounds}")
        named = {function.__name__: function for function in functions}
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        tools, new = [describe(function) for function in functions], []
        while True:
            reply = self.respond(
                [*given, *new],
                instructions=instructions,
                reasoning=reasoning,
                tools=tools,
                max_tokens=max_tokens,
                sampling=sampling,
            )
            new += reply.messages
            max_rounds -= 1
            if reply.finish_reason is not FinishReason.TOOL_CALLS or not max_rounds:
                return ToolRun(reply=reply, messages=tuple(new))
            new += [
                tool_result(made.recipient, call(named[made.name], made.arguments))
                for made in reply.tool_calls
            ]

    def close(self) -> None:
        """Cancel every turn and free the memory; does nothing the second time."""
        self._owner.close()
        self._intake.close()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
