"""One turn: where it stops, and what it comes to."""

import scripted

from mlx_gptoss.harmony import FinishReason, RepairKind
from mlx_gptoss.harmony.events import Repair, ToolCallDone
from mlx_gptoss.turn import Turn, harmony_engine

CALL = "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}"
INVENTED = "<|start|>functions.look to=assistant<|channel|>commentary<|message|>Seen.<|end|>"


def turn_of(script: str) -> Turn:
    engine = harmony_engine(scripted.ScriptedModel(script))  # type: ignore[arg-type]
    return Turn(engine, [1, 2, 3], recipients={"functions.look": "look"}, max_tokens=60)


def test_a_call_that_ends_in_end_ends_the_turn() -> None:
    """Sampling went on after `<|end|>`, no stop token, and the tool's answer was made up."""
    turn = turn_of(CALL + "<|end|>" + INVENTED)
    events = list(turn.events())
    assert ToolCallDone("look", "functions.look", "{}") in events
    assert turn.tokens == scripted.tokens_of(CALL + "<|end|>"), "sampled past the call"
    reply = turn.reply()
    assert reply.finish_reason is FinishReason.TOOL_CALLS and len(reply.tool_calls) == 1
    assert [e.kind for e in events if isinstance(e, Repair)] == [RepairKind.CALL_ENDED]
    assert turn.generation.cache.offset == 3 + len(turn.tokens) - 1, "all but the last were fed"
