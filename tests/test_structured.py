"""Answers held to a schema, and everything else of the turn to harmony."""

import json
import sys

import pytest
import scripted

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony import FinishReason, ResponseFormat, ToolDescription
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.structured import Guide
from mlx_gptoss.turn import harmony_engine

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "naïve dog"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "wild": {"type": "boolean"},
        "legs": {"type": "array", "items": {"enum": [2, 4]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["kind", "count", "wild", "legs"],
    "additionalProperties": False,
}
PET = ResponseFormat(name="pet", schema=SCHEMA)
THOUGHT = "<|channel|>analysis<|message|>A pet.<|end|><|start|>assistant"


def respond(script: str, *, seed: int = 0, **options):
    model = scripted.ScriptedModel(script)
    with Runtime(lambda: harmony_engine(model)) as runtime:  # type: ignore[arg-type]
        return runtime.respond("Pet?", response_format=PET, max_tokens=150,
                               sampling=SamplingParams(seed=seed), **options)  # fmt: skip


def check(text: str) -> None:
    pet = json.loads(text)
    assert set(pet) == {"kind", "count", "wild", "legs"}
    assert pet["kind"] in ("cat", "naïve dog") and 1 <= pet["count"] <= 99
    assert isinstance(pet["wild"], bool) and set(pet["legs"]) <= {2, 4}


@pytest.mark.parametrize(
    "script",
    [
        THOUGHT + "<|channel|>final<|message|>I have a cat, you know.<|return|>",
        THOUGHT + "<|channel|>final<|message|><|return|>",
        THOUGHT + "<|channel|>final<|channel|>final<|message|>{}<|return|>",
        THOUGHT + "<|channel|>commentary to=functions.none<|message|>{}<|call|>",
        '<|channel|>final <|constrain|>json<|message|>{"kind": "cow"}<|return|>',
    ],
)
def test_a_model_that_wants_something_else_answers_by_the_schema(script: str) -> None:
    replies = [respond(script, seed=seed) for seed in range(2)]
    answered = [r.text for r in replies if r.finish_reason is FinishReason.STOP]
    for text in answered:
        check(text)
    assert answered or "to=functions.none" in script, "that one may go on thinking"
    assert not any(reply.tool_calls for reply in replies)


def test_an_answer_by_the_schema_is_left_as_it_is() -> None:
    text = '{"kind": "naïve dog", "count": 7, "wild": false, "legs": [4, 2]}'
    reply = respond(THOUGHT + f"<|channel|>final<|message|>{text}<|return|>")
    assert (reply.text, reply.reasoning) == (text, "A pet.")
    check(text)


def test_a_declared_tool_can_be_called() -> None:
    call = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"a": 1}<|call|>'
    reply = respond(THOUGHT + call, tools=[ToolDescription(name="look")])
    assert [made.arguments for made in reply.tool_calls] == ['{"a": 1}']


def test_the_seed_decides_what_is_open() -> None:
    script = "<|channel|>final<|message|>no"
    texts = [respond(script, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_schema_beyond_us_is_refused() -> None:
    with pytest.raises(SchemaError, match="response_format 'x': expected a JSON schema that can"):
        Guide(ResponseFormat(name="x", schema={"not": {"type": "string"}}), recipients=())


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SchemaError, match=r'run `pip install "mlx-gptoss\[structured\]"`'):
        Guide(PET, recipients=())
