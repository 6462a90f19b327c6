"""What an app asks of a turn, read and rendered in the app's own thread."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Literal

from mlx_gptoss.conversation import Answers, Messages, Tools, read_conversation
from mlx_gptoss.harmony import ReasoningEffort, RenderOptions
from mlx_gptoss.harmony.ledger import prepare_prompt
from mlx_gptoss.memory import Memory
from mlx_gptoss.owner import Task
from mlx_gptoss.rules import ToolChoice, TurnRules
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.stream import Outbox

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

    def read(
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
            context = admission.grant(context, max_tokens)
            if max_tokens is None:
                max_tokens = max(context - len(prompt.tokens), 1)
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
