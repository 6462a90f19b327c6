"""The state of a chat: what was said, what stands above it, what it cost."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from mlx_gptoss.cli.chat_file import SavedChat, read_chat, write_chat
from mlx_gptoss.cli.console import Progress, note
from mlx_gptoss.cli.reply import Printer, reasoning_place, stats_line
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.harmony import (
    DeveloperContent,
    FinishReason,
    Message,
    ReasoningEffort,
    SystemContent,
    TextDelta,
    Toolbox,
    ToolCallDone,
    assistant,
    developer,
    system,
    tool_result,
    user,
)
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tools import call, describe
from mlx_gptoss.turn import Reply

MOST_ROUNDS = 8  # replies to one message, calls of tools included


class Session:
    """One chat.

    Args:
        runtime: Answers.
        reasoning: low, medium or high.
        instructions: Stand above the chat.
        max_tokens: Of one reply.
        sampling: How to choose tokens.
        show_reasoning: Print it to stderr, wherever stdout goes.
        quiet: No statistics.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        reasoning: str,
        instructions: str | None,
        max_tokens: int | None,
        sampling: SamplingParams,
        show_reasoning: bool,
        quiet: bool,
    ) -> None:
        self.quiet = quiet
        self._runtime, self._max_tokens, self._sampling = runtime, max_tokens, sampling
        self._place = reasoning_place(show_reasoning=show_reasoning)
        self._functions: dict[str, Callable[..., Any]] = {}
        self._toolbox = Toolbox()
        self._system = SystemContent(
            effort=ReasoningEffort(reasoning), date=date.today().isoformat()
        )
        self._instructions = instructions
        self._messages: list[Message] = []
        self._turns: list[Reply] = []

    def ask(self, text: str) -> None:
        """Answer a message; one that fails or is stopped before its answer is forgotten."""
        before = len(self._messages)
        self._messages.append(user(text))
        try:
            for _ in range(MOST_ROUNDS):
                reply = self._reply()
                if reply.finish_reason is not FinishReason.TOOL_CALLS:
                    return
                self._messages += [self._answer(made) for made in reply.tool_calls]
            note(f"Warning: {MOST_ROUNDS} replies called tools, and none answered; ask again.")
        except BaseException:
            if self._messages[-1].channel != "final":
                del self._messages[before:]
            raise

    def _reply(self) -> Reply:
        """One reply, printed as it comes; what was said when it was stopped is kept."""
        printer, said = Printer(self._place), ""
        progress = Progress(quiet=self.quiet)
        with self._runtime.stream(
            [*self._head(), *self._messages],
            max_tokens=self._max_tokens,
            sampling=self._sampling,
            on_prefill=partial(progress.share, "reading the prompt"),
        ) as stream:
            try:
                for event in stream:
                    said += event.text if isinstance(event, TextDelta) else ""
                    printer.event(event)  # after: what was shown when Ctrl-C came is kept
            except KeyboardInterrupt:
                progress.clear()
                if said:
                    self._messages.append(assistant(said))
                raise
            finally:
                printer.close()
            reply = stream.reply()
        self._messages += reply.messages
        self._turns.append(reply)
        if not reply.text and reply.finish_reason is FinishReason.LENGTH:
            note("Warning: the tokens ran out before the answer began; raise --max-tokens.")
        note(stats_line(reply), quiet=self.quiet)
        return reply

    def _head(self) -> list[Message]:
        head = [system(self._system)]
        if self._instructions or self._toolbox.functions:
            content = DeveloperContent(
                instructions=self._instructions, tools=self._toolbox.functions
            )
            head.append(developer(content))
        return head

    def _answer(self, made: ToolCallDone) -> Message:
        name = made.recipient.partition(".")[2]
        result = call(self._functions[name], made.arguments)
        note(f"{name}({made.arguments}) = {result}", quiet=self.quiet)
        return tool_result(made.recipient, result)

    def reset(self) -> str:
        """Forget what was said."""
        self._messages.clear()
        return "A new chat."

    def set_reasoning(self, level: str) -> str:
        """Set or tell how long the model thinks."""
        if level:
            if level not in list(ReasoningEffort):
                raise GptOssError(f"/reasoning: expected low, medium or high, got {level!r}")
            self._system = replace(self._system, effort=ReasoningEffort(level))
        return f"Reasoning: {self._system.effort}."

    def set_instructions(self, text: str) -> str:
        """Set or tell what stands above the chat."""
        self._instructions = text or self._instructions
        return f"System: {self._instructions or 'nothing'}"

    def set_tools(self, path: str) -> str:
        """Offer the public functions of a Python file, or tell which are offered."""
        if path:
            functions = _functions_of(Path(path).expanduser())
            self._toolbox = Toolbox([describe(f) for f in functions.values()])
            self._functions = functions
        return f"Tools: {', '.join(self._functions) or 'none'}."

    def save(self, path: str) -> str:
        """Write the chat to a file."""
        chat = SavedChat(
            date=self._system.date,
            reasoning=self._system.effort or ReasoningEffort.MEDIUM,
            instructions=self._instructions,
            messages=self._messages,
        )
        write_chat(_given(path, "/save"), chat)
        return f"{len(self._messages)} messages saved to {path}."

    def load(self, path: str) -> str:
        """Go on with a saved chat; the present one stays as it is if that cannot be read."""
        chat = read_chat(_given(path, "/load"))
        self._messages, self._instructions = list(chat.messages), chat.instructions
        self._system = replace(self._system, date=chat.date, effort=chat.reasoning)
        return f"{len(chat.messages)} messages loaded from {path}."

    def stats(self) -> str:
        """What the chat cost so far."""
        used = [reply.usage for reply in self._turns]
        prompt, cached = sum(u.prompt_tokens for u in used), sum(u.cached_tokens for u in used)
        return (
            f"{len(used)} replies | prompt {prompt} tok, {cached} of them reused | output "
            f"{sum(u.completion_tokens for u in used)} tok "
            f"({sum(u.reasoning_tokens for u in used)} reasoning)"
        )


def _given(path: str, command: str) -> Path:
    if not path:
        raise GptOssError(f"{command}: expected the name of a file")
    return Path(path).expanduser()


def _functions_of(path: Path) -> dict[str, Callable[..., Any]]:
    """The public functions that a Python file defines; runs the file."""
    if not path.is_file():
        raise GptOssError(f"{path}: expected a Python file with functions, got none")
    try:
        defined = runpy.run_path(str(path), run_name="chat_tools")
    except (Exception, SystemExit) as error:
        raise GptOssError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    functions = {
        value.__name__: value
        for name, value in defined.items()
        if isinstance(value, FunctionType)
        and value.__module__ == "chat_tools"
        and not name.startswith("_")
    }
    if not functions:
        raise GptOssError(f"{path}: expected public functions, got none")
    return functions
