"""Answers that follow a JSON schema: one grammar over the whole harmony turn.

The grammar holds headers and control tokens too, so a turn reaches an answer or a call through
reasoning and preambles, and can go nowhere else: no malformed header, no prose in the answer. The
masks are llguidance's (the extra `structured`), which needs the last token for the next mask; so
such a turn is decoded without the engine's step ahead.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony import ResponseFormat
from mlx_gptoss.vocabulary import N_VOCAB, Special, load_vocabulary

GRAMMAR = r"""
start: (think | preamble)* last
sep: <|end|> <|start|> "assistant"
think: <|channel|> "analysis" <|message|> TEXT sep
preamble: <|channel|> "commentary" <|message|> TEXT sep
last: {last}
final: <|channel|> "final" (" "? <|constrain|> "json")? <|message|> answer <|return|>
answer: %json {schema}
json: " "? <|constrain|> "json" | " json"
TEXT: /(.|\n)*/
"""
CALL = """
call_{n}: ( <|channel|> {inside} json? | {before} <|channel|> "commentary" json? ) <|message|> \
arguments_{n} <|call|>
arguments_{n}: %json {{"type": "object"}}
"""
PLAIN_CALL = """
call_{n}: ( <|channel|> {inside} " code"? | {before} <|channel|> "commentary" " code"? ) \
<|message|> TEXT <|call|>
"""


# Enough to indent; without a bound a model can write spaces for ever and never break the schema.
WHITESPACE = r"[ \n\t]{0,24}"


class Guide:
    """Says which token may come next; one for each turn.

    Args:
        answers: What the answer must follow.
        recipients: Harmony names of the tools that may be called instead.

    Raises:
        SchemaError: llguidance is missing, or cannot enforce the schema.
    """

    def __init__(self, answers: ResponseFormat, *, recipients: Iterable[str]):
        llguidance = _llguidance()
        grammar = harmony_grammar(answers.schema, recipients=recipients)
        self._matcher = llguidance.LLMatcher(_tokenizer(), grammar)
        if error := self._matcher.get_error():
            raise SchemaError(
                f"response_format {answers.name!r}: expected a JSON schema that can be enforced, "
                f"got: {' '.join(str(error).split())}"
            )
        self._bits = np.zeros((1, (N_VOCAB + 31) // 32), np.int32)

    def allowed(self) -> mx.array:
        """(V,) bool: the tokens that may come next."""
        fill = import_module("llguidance.numpy").fill_next_token_bitmask
        fill(self._matcher, self._bits)
        words = mx.array(self._bits.view(np.uint32)[0])
        bits = (words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1
        return bits.astype(mx.bool_).reshape(-1)[:N_VOCAB]

    def accept(self, token: int) -> None:
        """Note the token that was chosen."""
        self._matcher.consume_token(token)


def harmony_grammar(schema: Mapping[str, Any], *, recipients: Iterable[str]) -> str:
    """The Lark grammar of a turn that ends in an answer of a schema, or in a call."""
    calls = []
    for n, recipient in enumerate(recipients):
        quoted = {
            "inside": json.dumps(f"commentary to={recipient}"),
            "before": json.dumps(f" to={recipient}"),
        }
        calls.append((CALL if "." in recipient else PLAIN_CALL).format(n=n, **quoted))
    schema = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
    last = " | ".join(["final", *(f"call_{n}" for n in range(len(calls)))])
    return GRAMMAR.format(last=last, schema=json.dumps(schema)) + "".join(calls)


def _llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise SchemaError(
            "response_format: expected the package llguidance, which is not installed; run "
            '`pip install "mlx-gptoss[structured]"`'
        ) from error


@cache
def _tokenizer() -> Any:
    """Built once, in a few seconds."""
    build = import_module("llguidance.tiktoken").lltokenizer_from_encoding
    return build(load_vocabulary().encoding, n_vocab=N_VOCAB, eos_token=int(Special.RETURN))
