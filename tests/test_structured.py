"""Answers and calls held to schemas, and everything else of the turn to harmony."""

import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import scripted

from mlx_gptoss import structured
from mlx_gptoss.conversation import read_conversation
from mlx_gptoss.errors import HarmonyError, SchemaError
from mlx_gptoss.harmony import BROWSER, PYTHON, FinishReason, ResponseFormat, ToolDescription
from mlx_gptoss.rules import TurnRules
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams, unpacked
from mlx_gptoss.structured import Guide
from mlx_gptoss.turn import harmony_engine
from mlx_gptoss.vocabulary import N_TEXT, N_VOCAB, Special, load_vocabulary

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


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "São Paulo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get-weather", "parameters": WEATHER,
                                      "strict": True}},
    {"type": "function", "function": {"name": "look", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop", "strict": True}},
]  # fmt: skip
ANSWER = THOUGHT + "<|channel|>final<|message|>It is fine.<|return|>"
CALLS = [
    THOUGHT + "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>",
    " to=functions.{}<|channel|>commentary json<|message|>{}<|call|>",
]


def turn(script: str, *, seed: int = 0, **options):
    model = scripted.ScriptedModel(script)
    with Runtime(lambda: harmony_engine(model)) as runtime:  # type: ignore[arg-type]
        return runtime.respond("Weather?", tools=TOOLS, max_tokens=80,
                               sampling=SamplingParams(seed=seed), **options)  # fmt: skip


def called(reply) -> tuple[str, dict]:
    (made,) = reply.tool_calls
    assert reply.finish_reason is FinishReason.TOOL_CALLS
    return made.name, json.loads(made.arguments)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wanted", ['{"city": "Rome"}', "[1]", "Oslo, I think", "{}", ""])
def test_a_strict_tool_is_called_by_its_schema(call: str, wanted: str) -> None:
    name, arguments = called(turn(call.format("get_weather", wanted)))
    assert name == "get-weather" and set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Oslo", "São Paulo") and 1 <= arguments["days"] <= 7


def test_arguments_by_the_schema_are_left_as_they_are() -> None:
    for call in CALLS:
        reply = turn(call.format("get_weather", '{"city": "São Paulo", "days": 3}'))
        assert reply.tool_calls[0].arguments == '{"city": "São Paulo", "days": 3}'


def test_a_strict_tool_without_parameters_takes_none() -> None:
    assert called(turn(CALLS[0].format("stop", '{"now": 1}'))) == ("stop", {})


def test_a_tool_that_is_not_strict_takes_any_object() -> None:
    assert called(turn(CALLS[0].format("look", '{"city": "Rome"}'))) == ("look", {"city": "Rome"})


def may_write(script: str, *, tools=TOOLS, **options) -> bool:
    """Whether the rules let a whole turn pass."""
    rules = read_conversation("Hi", date="2026-01-01", tools=tools, **options).rules
    assert rules is not None
    return passes(Guide(rules), script)


def allowed(guide: Guide) -> np.ndarray:
    """The tokens that may come next, (V,) bool."""
    return np.array(unpacked(mx.array(guide.allowed()), N_VOCAB))


def passes(guide: Guide, script: str) -> bool:
    """Whether a guide allows every token of a script in its turn."""
    for token in load_vocabulary().encoding.encode(script, allowed_special="all"):
        if not allowed(guide)[token]:
            return False
        guide.accept(token)
    return True


CAT = (
    THOUGHT + '<|channel|>final<|message|>{"kind":"cat","count":1,"wild":true,"legs":[4]}<|return|>'
)
LOOK, STRICT = CALLS[0].format("look", "{}"), CALLS[1].format("stop", "{}")
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("options", "passing"),
    [
        ({}, {ANSWER, CAT, LOOK, STRICT}),
        ({"tool_choice": "required"}, {LOOK, STRICT}),
        ({"tool_choice": NAMED}, {LOOK}),
        ({"tool_choice": "none"}, {ANSWER, CAT}),
        ({"response_format": PET}, {CAT, LOOK, STRICT}),
        ({"response_format": PET, "tool_choice": "required"}, {LOOK, STRICT}),
        ({"response_format": PET, "tool_choice": "none"}, {CAT}),
    ],
)
def test_tool_choice_and_schema_decide_how_a_turn_ends(options: dict, passing: set[str]) -> None:
    scripts = {ANSWER, CAT, LOOK, STRICT}
    assert {script for script in scripts if may_write(script, **options)} == passing
    assert not may_write(CALLS[0].format("stop", '{"now":1}'), **options)
    assert not may_write(CALLS[0].format("unknown", "{}"), **options)


def test_a_turn_that_asks_for_nothing_is_not_guided() -> None:
    free = [TOOLS[1]]
    auto, none = {"tool_choice": "auto"}, {"tool_choice": "none"}
    for options in ({}, {"tools": free}, {"tools": free, **auto}, none):
        assert read_conversation("Hi", date="2026-01-01", **options).rules is None


def test_a_model_that_wants_another_tool_calls_the_tool_that_was_chosen() -> None:
    for script in (LOOK, CALLS[1].format("look", "{}")):
        strict = {"type": "function", "function": {"name": "get-weather"}}
        assert called(turn(script, tool_choice=strict))[0] == "get-weather"


@pytest.mark.parametrize(
    "call",
    [
        "<|channel|>analysis to=python code<|message|>print(1)\n<|call|>",
        " to=python<|channel|>commentary<|message|>1 + 1<|call|>",
        '<|channel|>analysis to=browser.open code<|message|>{"id": 1}<|call|>',
    ],
)
def test_the_models_own_tools_are_called_as_in_training(call: str) -> None:
    options = {"tools": [PYTHON, BROWSER], "tool_choice": "required"}
    assert may_write(call, **options) and may_write(THOUGHT + call, **options)
    assert not may_write(call.replace("python", "functions.look"), tools=TOOLS)
    assert not may_write(call.replace('{"id": 1}', "1").replace("python", "x"), **options)


@pytest.mark.parametrize(
    ("tools", "choice", "error"),
    [
        ([], "required", "tool_choice: expected tools beside 'required', got none; offer some"),
        (TOOLS, "any", 'tool_choice: expected "auto", "none", "required" or '),
        (TOOLS, {"type": "function"}, "got {'type': 'function'}"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "tool 'x': expected one of"),
        ([{"function": {"name": "x", "parameters": 1}}], "auto",
         "tools[0].function.parameters: expected a schema, got 1"),
        ([{"function": {"name": "x", "strict": "no"}}], "auto",
         "tools[0].function.strict: expected true or false, got 'no'"),
    ],
)  # fmt: skip
def test_a_choice_that_is_none_is_refused(tools, choice, error: str) -> None:
    with pytest.raises(HarmonyError, match=re.escape(error)):
        read_conversation("Hi", date="2026-01-01", tools=tools, tool_choice=choice)


def test_an_answer_that_is_cut_is_the_beginning_of_one() -> None:
    text = '{"kind": "cat", "count": 7, "wild": false, "legs": [4, 2]}'
    model = scripted.ScriptedModel(f"<|channel|>final<|message|>{text}<|return|>")
    with Runtime(lambda: harmony_engine(model)) as runtime:  # type: ignore[arg-type]
        for limit in (4, 8, 12):
            reply = runtime.respond("Pet?", response_format=PET, max_tokens=limit)
            assert reply.finish_reason is FinishReason.LENGTH
            assert text.startswith(reply.text) and len(reply.text) < len(text)


def test_spellings_of_control_tokens_in_a_schema_are_text() -> None:
    schema = {"const": "<|return|><|end|><|start|>assistant"}
    guide = guide_of(schema)
    head = load_vocabulary().encoding.encode("<|channel|>final<|message|>", allowed_special="all")
    body = load_vocabulary().encode(json.dumps(schema["const"]))
    for token in [*head, *body]:
        flags = allowed(guide)
        assert flags[token] and (token in head or not flags[N_TEXT:].any())
        guide.accept(token)
    assert allowed(guide)[Special.RETURN]


def guide_of(schema) -> Guide:
    answers = ResponseFormat(name="x", schema=schema)
    return Guide(TurnRules(answers=answers, calls={}, must_call=False))


def test_white_space_is_bounded_and_a_schema_may_forbid_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    compact = {**schema, "x-guidance": {"whitespace_pattern": ""}}
    script = '<|channel|>final<|message|>{{"a":{}null}}<|return|>'
    assert passes(guide_of(schema), script.format(24 * " "))
    assert not passes(guide_of(schema), script.format(25 * " "))
    assert passes(guide_of(compact), script.format(""))
    assert not passes(guide_of(compact), script.format(" "))


@pytest.mark.parametrize(
    ("schema", "place", "why"),
    [
        ({"not": {"type": "string"}}, "#", 'Unimplemented keys: ["not"]'),
        ({"properties": {"a": {"items": {"type": "array", "uniqueItems": True}}}},
         "#/properties/a/items", 'Unimplemented keys: ["uniqueItems"]'),
        ({"anyOf": [{"type": "null"}, {"type": "string", "format": "zip"}]}, "#/anyOf/1",
         "Unknown format: zip"),
        ({"$defs": {"a": {"type": "text"}}, "items": {"$ref": "#/$defs/a"}}, "#/$defs/a",
         "Invalid type: text"),
        ({"properties": 3}, "#", "properties must be an object"),
        ({"enum": ["a"], "x-guidance": 3}, "#", "expected struct JsonCompileOptions"),
    ],
)  # fmt: skip
def test_a_schema_beyond_us_is_refused(schema: dict, place: str, why: str) -> None:
    error = f"response_format 'x', at {place}: expected a JSON schema that can be enforced, got: "
    with pytest.raises(SchemaError, match=f"{re.escape(error)}.*{re.escape(why)}"):
        guide_of(schema)


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"properties": {"x": {"contains": {}}}}, ", at #/properties/x: expected a JSON schema"),
        ({"type": "string"}, ": expected the schema of an object, got type 'string'"),
    ],
)
def test_a_strict_tool_beyond_us_is_named(parameters: dict, error: str) -> None:
    with pytest.raises(SchemaError, match=f"^parameters of the strict tool 'a b'{error}"):
        may_write("", tools=[ToolDescription(name="a b", parameters=parameters, strict=True)])


def test_what_llguidance_gives_up_is_an_error_and_no_answer() -> None:
    guide = guide_of(SCHEMA)
    guide.accept(5)
    with pytest.raises(SchemaError, match="turn: expected a grammar that llguidance can follow"):
        guide.allowed()


def test_a_turn_whose_guide_gives_up_ends_in_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guide, "accept", lambda guide, token: guide._matcher.consume_token(5))
    with pytest.raises(SchemaError, match="turn: expected a grammar that llguidance can follow"):
        respond(THOUGHT)


def test_threads_at_once_build_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each built its own, of seconds and megabytes."""
    meeting, built = threading.Barrier(3), []

    def build(*_: object, **__: object) -> object:
        built.append(object())
        time.sleep(0.05)  # long enough for the others to come too
        return built[-1]

    def ask() -> object:
        meeting.wait(10)
        return structured._tokenizer()

    monkeypatch.setattr("llguidance.tiktoken.lltokenizer_from_encoding", build)
    monkeypatch.setattr(
        structured, "_built_tokenizer", cache(structured._built_tokenizer.__wrapped__)
    )
    with ThreadPoolExecutor(3) as pool:
        found = {future.result() for future in [pool.submit(ask) for _ in range(3)]}
    assert found == set(built) and len(built) == 1


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SchemaError, match=r'run `pip install "mlx-gptoss\[structured\]"`'):
        guide_of(SCHEMA)
