"""The harmony format at token level: conversations to tokens, sampled tokens to events.

gpt-oss reads and writes harmony only. `render` turns messages into prompt tokens, `parse` turns
sampled tokens into typed events, however malformed they are. Texts and control tokens never mix:
no text of a user can become a control token, and no control token is ever shown as text.

    from mlx_gptoss.harmony import (
        HarmonyParser, SystemContent, STOP_TOKENS, render_conversation_for_completion, system, user,
    )
    prompt = render_conversation_for_completion([system(SystemContent()), user("Hi")])
    parser = HarmonyParser()
    for token in sampled:                       # until one of STOP_TOKENS, or a TurnDone
        for event in parser.feed(token):
            ...
"""

from mlx_gptoss.harmony.builtin_tools import BROWSER, PYTHON
from mlx_gptoss.harmony.events import (
    Event,
    FinishReason,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    Repair,
    RepairKind,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallStarted,
    TurnDone,
)
from mlx_gptoss.harmony.frames import STOP_TOKENS
from mlx_gptoss.harmony.messages import (
    Channel,
    DeveloperContent,
    Message,
    ReasoningEffort,
    ResponseFormat,
    Role,
    SystemContent,
    ToolDescription,
    ToolNamespace,
    assistant,
    developer,
    function_tools,
    system,
    tool_call,
    tool_result,
    user,
)
from mlx_gptoss.harmony.names import Toolbox
from mlx_gptoss.harmony.parse import HarmonyParser
from mlx_gptoss.harmony.render import (
    OldAnalysis,
    RenderOptions,
    Schemas,
    render_conversation,
    render_conversation_for_completion,
    render_conversation_for_training,
    render_message,
)

__all__ = [
    "BROWSER",
    "PYTHON",
    "STOP_TOKENS",
    "Channel",
    "DeveloperContent",
    "Event",
    "FinishReason",
    "HarmonyParser",
    "Message",
    "MessageDone",
    "OldAnalysis",
    "PreambleDelta",
    "ReasoningDelta",
    "ReasoningEffort",
    "RenderOptions",
    "Repair",
    "RepairKind",
    "ResponseFormat",
    "Role",
    "Schemas",
    "SystemContent",
    "TextDelta",
    "ToolCallDelta",
    "ToolCallDone",
    "ToolCallStarted",
    "ToolDescription",
    "ToolNamespace",
    "Toolbox",
    "TurnDone",
    "assistant",
    "developer",
    "function_tools",
    "render_conversation",
    "render_conversation_for_completion",
    "render_conversation_for_training",
    "render_message",
    "system",
    "tool_call",
    "tool_result",
    "user",
]
