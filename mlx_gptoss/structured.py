"""Turns that follow rules: one grammar over the whole harmony turn.

The grammar holds headers and control tokens too, so a turn reaches an answer or a call through
reasoning and preambles, and can go nowhere else: no malformed header, no prose in an answer that
has a schema, no call that was not offered. The masks are llguidance's (the extra `structured`),
which must see a token before it can mask the next one; the engine feeds the token meanwhile.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony import ToolDescription
from mlx_gptoss.rules import TurnRules
from mlx_gptoss.vocabulary import N_VOCAB, Special, load_vocabulary

GRAMMAR = r"""
start: (think | preamble)* ({last})
sep: <|end|> <|start|> "assistant"
think: <|channel|> "analysis" <|message|> TEXT sep
preamble: <|channel|> "commentary" <|message|> TEXT sep
kind: " "? <|constrain|> "json" | " json" | " code"
TEXT: /(.|\n)*/
"""
FREE_ANSWER = """
final: <|channel|> "final" <|message|> TEXT <|return|>
"""
ANSWER = """
final: <|channel|> "final" (" "? <|constrain|> "json")? <|message|> answer <|return|>
answer: %json {schema}
"""
CALL = """
call_{n}: ( <|channel|> ({channels}) {to} | {to} <|channel|> ({channels}) ) kind? <|message|> \
arguments_{n} <|call|>
"""


# Enough to indent; without a bound a model can write spaces for ever and never break the schema.
WHITESPACE = r"[ \n\t]{0,24}"


class Guide:
    """Says which token may come next; one for each turn.

    It may be made in any thread and asked in another, but not by two at once.

    Args:
        rules: How the turn may end.

    Raises:
        SchemaError: llguidance is missing, or cannot enforce a schema.
    """

    def __init__(self, rules: TurnRules):
        llguidance = _llguidance()
        self._matcher = llguidance.LLMatcher(_tokenizer(), harmony_grammar(rules), log_level=0)
        if self._matcher.is_error():
            raise SchemaError(_fault(rules) or self._failure())
        self._bits = np.zeros((1, (N_VOCAB + 31) // 32), np.int32)

    def allowed(self) -> npt.NDArray[np.uint32]:
        """The tokens that may come next, as bits; see `sampling.packed`.

        Returns:
            (V/32,) uint32, overwritten by the next call.

        Raises:
            SchemaError: llguidance gave up, at one of its limits.
        """
        fill = import_module("llguidance.numpy").fill_next_token_bitmask
        fill(self._matcher, self._bits)
        if self._matcher.is_error():
            raise SchemaError(self._failure())
        return self._bits.view(np.uint32)[0]

    def accept(self, token: int) -> None:
        """Note the token that was chosen."""
        self._matcher.consume_token(token)

    def _failure(self) -> str:
        error = self._matcher.get_error().partition("\n")[0]
        return f"turn: expected a grammar that llguidance can follow, got: {error}"


def harmony_grammar(rules: TurnRules) -> str:
    """The Lark grammar of a turn that ends by the rules."""
    ends, parts = [], []
    if not rules.must_call:
        ends.append("final")
        answers = rules.answers
        parts.append(
            ANSWER.format(schema=_told(answers.schema)) if answers is not None else FREE_ANSWER
        )
    for n, (recipient, strict) in enumerate(rules.calls.items()):
        ends.append(f"call_{n}")
        channels = '"commentary"'
        if not recipient.startswith("functions."):  # the models were trained to call these there
            channels += ' | "analysis"'
        parts.append(CALL.format(n=n, channels=channels, to=json.dumps(f" to={recipient}")))
        takes = f"%json {_told(arguments_schema(strict))}" if "." in recipient else "TEXT"
        parts.append(f"arguments_{n}: {takes}\n")
    return GRAMMAR.format(last=" | ".join(ends)) + "".join(parts)


def arguments_schema(strict: ToolDescription | None) -> Mapping[str, Any]:
    """What the arguments of a call follow: a strict tool's schema, else any JSON object.

    Raises:
        SchemaError: The strict tool's schema is not that of an object.
    """
    if strict is None:
        return {"type": "object"}
    if strict.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if (kind := strict.parameters.get("type", "object")) != "object":
        raise SchemaError(
            f"parameters of the strict tool {strict.name!r}: expected the schema of an object, got "
            f"type {kind!r}"
        )
    return {"type": "object", **strict.parameters}


def _told(schema: Mapping[str, Any]) -> str:
    """A schema as the grammar holds it; its own `x-guidance` may say more, or other white space."""
    given = schema.get("x-guidance", {})
    options = {"whitespace_pattern": WHITESPACE, **given} if _is_map(given) else given
    return json.dumps({**schema, "x-guidance": options})


def _fault(rules: TurnRules) -> str | None:
    """Which schema cannot be enforced, where in it, and why; None if each can."""
    schemas: dict[str, Mapping[str, Any]] = {}
    if rules.answers is not None and not rules.must_call:
        schemas[f"response_format {rules.answers.name!r}"] = rules.answers.schema
    for strict in rules.calls.values():
        if strict is not None:
            schemas[f"parameters of the strict tool {strict.name!r}"] = arguments_schema(strict)
    for where, schema in schemas.items():
        if why := _complaint(schema):
            return (
                f"{where}, at {_place(schema, why)}: expected a JSON schema that can be enforced, "
                f"got: {' '.join(why.split())}"
            )
    return None


def _place(schema: Mapping[str, Any], why: str) -> str:
    """JSON pointer to the innermost part of a schema that gives rise to a complaint by itself."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    place, part = "#", schema
    while True:
        for step, inner in _parts(part):
            if _complaint({**definitions, **inner}) == why:
                place, part = f"{place}/{step}", inner
                break
        else:
            return place


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas right inside a schema, each with the steps to it."""
    for key in ("$defs", "definitions", "properties", "patternProperties"):
        if _is_map(named := schema.get(key)):
            yield from ((f"{key}/{name}", part) for name, part in named.items() if _is_map(part))
    for key in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(listed := schema.get(key), list):
            yield from ((f"{key}/{n}", part) for n, part in enumerate(listed) if _is_map(part))
    for key in ("items", "additionalProperties"):
        if _is_map(part := schema.get(key)):
            yield key, part


def _is_map(part: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(part, Mapping)


def _complaint(schema: Mapping[str, Any]) -> str:
    """Why llguidance cannot enforce a schema; empty if it can."""
    matcher = _llguidance().LLMatcher
    return matcher.validate_grammar(matcher.grammar_from_json_schema(json.dumps(schema)))


def _llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise SchemaError(
            "response_format, strict tools and tool_choice: expected the package llguidance, which "
            'is not installed; run `pip install "mlx-gptoss[structured]"`'
        ) from error


_BUILDING = threading.Lock()


def _tokenizer() -> Any:
    """One for all turns; who needs it while another thread builds it waits for that."""
    with _BUILDING:
        return _built_tokenizer()


@cache
def _built_tokenizer() -> Any:
    """Built in a few seconds."""
    build = import_module("llguidance.tiktoken").lltokenizer_from_encoding
    return build(load_vocabulary().encoding, n_vocab=N_VOCAB, eos_token=int(Special.RETURN))
