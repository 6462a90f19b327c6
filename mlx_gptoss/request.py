"""What an app asks of a turn, on its way to the thread that owns the model.

It is read and rendered in the app's own thread. So are schemas compiled, but for event loops.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

from mlx_gptoss.conversation import Answers, Messages, Tools, read_conversation
from mlx_gptoss.harmony import ReasoningEffort, RenderOptions
from mlx_gptoss.harmony.ledger import prepare_prompt
from mlx_gptoss.memory import Memory
from mlx_gptoss.owner import Owner
from mlx_gptoss.rules import ToolChoice, TurnRules
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.stream import Outbox
from mlx_gptoss.structured import Guide
from mlx_gptoss.task import Task

Effort = ReasoningEffort | Literal["low", "medium", "high"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `Runtime.stream`, which says what they are."""

    messages: Messages
    instructions: str | None
    reasoning: Effort | None
    tools: Tools
    tool_choice: ToolChoice
    response_format: Answers | None
    max_tokens: int | None
    sampling: SamplingParams | None
    on_prefill: Callable[[int, int], None] | None = None

    def task(
        self, *, admission: Memory | None, rendering: RenderOptions, outbox: Outbox
    ) -> tuple[Task, TurnRules | None]:
        """The turn for the thread that owns the model, and the rules that it has no guide for yet.

        Args:
            admission: Says what to reserve; None reserves what is asked for.
            rendering: How the conversation is told to the model.
            outbox: Takes the events.

        Raises:
            HarmonyError: See `Runtime.stream`.
            MachineError: See there.
            ValueError: See there.
        """
        max_tokens = self.max_tokens
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: expected a whole number >= 1 or None, got {max_tokens}")
        conversation = read_conversation(
            self.messages,
            date=date.today().isoformat(),
            instructions=self.instructions,
            reasoning=self.reasoning,
            tools=self.tools,
            tool_choice=self.tool_choice,
            response_format=self.response_format,
        )
        prompt = prepare_prompt(conversation.messages, options=rendering)
        context = len(prompt.tokens)
        if admission is not None:
            context, max_tokens = admission.grant(context, max_tokens)
        task = Task(
            prompt=prompt,
            head=prompt.ends[conversation.head - 1],
            recipients=conversation.recipients,
            sampling=(self.sampling or SamplingParams()).seeded(),
            max_tokens=max_tokens,
            context=context,
            guide=None,
            outbox=outbox,
            on_prefill=self.on_prefill,
        )
        return task, conversation.rules


class Intake:
    """Hands requests to an owner; every method may be called from any thread.

    Args:
        owner: Takes the turns.
        admission: Says what to reserve; None admits everything.
        rendering: How conversations are told to the model.
    """

    def __init__(self, owner: Owner, *, admission: Memory | None, rendering: RenderOptions):
        self._owner, self._admission, self._rendering = owner, admission, rendering
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="mlx-gptoss-schemas")

    def submit(self, request: Request) -> Outbox:
        """Submit a turn, and return where its events arrive.

        Raises:
            GptOssError: See `Runtime.stream`.
        """
        task, rules = self._read(request)
        self._guide(task, rules)
        return task.outbox

    def submit_soon(self, request: Request) -> Outbox:
        """The same for event loops, which must not wait while schemas are compiled.

        Raises:
            GptOssError: See `Runtime.stream`; what is wrong with a schema arrives as an event does.
        """
        task, rules = self._read(request)
        if rules is None:
            self._owner.submit(task)
            return task.outbox
        try:
            self._compiler.submit(self._guide_later, task, rules)
        except RuntimeError:
            self._owner.check()  # closed meanwhile
            raise
        return task.outbox

    def close(self) -> None:
        """Wait for schemas that are being compiled, once the owner is closed."""
        self._compiler.shutdown()

    def _read(self, request: Request) -> tuple[Task, TurnRules | None]:
        self._owner.check()
        return request.task(
            admission=self._admission,
            rendering=self._rendering,
            outbox=Outbox(self._owner.wake),
        )

    def _guide(self, task: Task, rules: TurnRules | None) -> None:
        self._owner.submit(task if rules is None else replace(task, guide=Guide(rules)))

    def _guide_later(self, task: Task, rules: TurnRules) -> None:
        try:
            self._owner.check()
            if not task.outbox.cancelled:
                self._guide(task, rules)
        except BaseException as error:  # a panic in Rust, too: nobody else would tell the reader
            task.outbox.put(error)
