"""Random JSON schemas with what apps use of them, small enough to be answered in few tokens.

Shared with `benchmarks/schemas.py`, which asks for answers to all of them.
"""

import json
import random
from collections.abc import Callable
from datetime import date
from typing import Any

import jsonschema

from mlx_gptoss.harmony import ReasoningDelta, ResponseFormat, TextDelta
from mlx_gptoss.runtime import Runtime
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.turn import Reply

Schema = dict[str, Any]
COUNT = 200
QUESTION = "Describe a pet."
COMPACT = {"x-guidance": {"whitespace_pattern": ""}}  # the demo would write white space above all

NAMES = ["id", "city", "größe", "is_open", "item-2", "with space", "$key", "a.b", "日付"]
WORDS = ["red", "naïve", "", "a\nb", 'say "hi"', "<|end|>", "雪", "\\d", "x/y"]
PATTERNS = [
    "^[a-z]{1,6}$",
    "^\\d{3}-\\d{2}$",
    "^(yes|no)$",
    "^[A-ZÄÖ][a-z]{0,5}$",
    "^#[0-9a-f]{6}$",
]
FORMATS = ["date", "uuid", "ipv4", "email"]


def random_schema(seed: int) -> Schema:
    """The schema of a seed; most are objects, as apps' are."""
    rng = random.Random(seed)
    make = _Maker(rng)
    root = make.object(2) if rng.random() < 0.8 else make.any(2)
    if make.definitions:
        root["$defs"] = make.definitions
    return root


CHECKS = jsonschema.FormatChecker(["uuid", "ipv4", "email"])


@CHECKS.checks("date", raises=ValueError)
def _is_date(text: Any) -> bool:
    """A date of RFC 3339, which has a year 0 where Python has none; a leap year, like 2000."""
    return not isinstance(text, str) or bool(date.fromisoformat(text.replace("0000-", "2000-", 1)))


def mistakes(schema: Schema, text: str) -> list[str]:
    """What a validator that knows nothing of grammars finds wrong in an answer."""
    checked = jsonschema.Draft202012Validator(schema, format_checker=CHECKS)
    return [error.message for error in checked.iter_errors(json.loads(text))]


def options(schema: Schema, *, seed: int, max_tokens: int) -> dict[str, Any]:
    """How the demo is asked for an answer, at temperature 1."""
    return {
        "response_format": ResponseFormat(name="thing", schema=schema),
        "reasoning": "low",
        "max_tokens": max_tokens,
        "sampling": SamplingParams(seed=seed),
    }


def streamed(runtime: Runtime, schema: Schema, **asked: int) -> Reply:
    """A reply whose deltas, joined, are its text and its reasoning."""
    with runtime.stream(QUESTION, **options(schema, **asked)) as stream:
        events = list(stream)
        reply = stream.reply()
    for kind, whole in ((TextDelta, reply.text), (ReasoningDelta, reply.reasoning)):
        assert "".join(event.text for event in events if isinstance(event, kind)) == whole
    return reply


def sampled(reply: Reply) -> list[tuple[int, ...] | None]:
    """The tokens of a reply's messages."""
    return [message.sampled for message in reply.messages]


class _Maker:
    """Makes the parts of one schema; `depth` is how many levels of containers may follow."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self.definitions: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        leaves = [self.string, self.string, self.integer, self.number, self.literal, self.nullable]
        nests = [self.object, self.array, self.tuple, self.union, self.reference, self.joined]
        made = self._rng.choice(leaves + nests if depth else leaves)(depth - 1)
        if self._rng.random() < 0.2:
            made["description"] = self._rng.choice(WORDS)
        return made

    def object(self, depth: int) -> Schema:
        names = self._rng.sample(NAMES, self._rng.randint(1, 3))
        made: Schema = {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if self._rng.random() < 0.7],
            "additionalProperties": False,
        }
        if self._rng.random() < 0.1:
            made["patternProperties"] = {"^x[0-9]$": self.integer(depth)}
        return made

    def array(self, depth: int) -> Schema:
        least = self._rng.randint(0, 2)
        items = self.any(depth)
        return {
            "type": "array", "items": items, "minItems": least,
            "maxItems": least + self._rng.randint(0, 2),
        }  # fmt: skip

    def tuple(self, depth: int) -> Schema:
        items = [self.any(depth) for _ in range(self._rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def union(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self._rng.randint(2, 3))]}

    def joined(self, depth: int) -> Schema:
        """Two objects in one; open to other names, or the first would refuse the second's."""
        first, second = self._rng.sample(NAMES, 2)
        parts = [{"type": "object", "properties": {name: self.any(depth)}, "required": [name]}
                 for name in (first, second)]  # fmt: skip
        return {"allOf": parts, "maxProperties": 2}

    def reference(self, depth: int) -> Schema:
        """A shared definition, or a list that holds itself."""
        if self._rng.random() < 0.3:
            self.definitions["Chain"] = {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/Chain"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
            return {"$ref": "#/$defs/Chain"}
        name = f"Shared{len(self.definitions)}"
        self.definitions[name] = {}  # taken, while its parts may take others
        self.definitions[name] = self.any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def string(self, depth: int) -> Schema:
        least = self._rng.randint(0, 3)
        return self._rng.choice([
            {"type": "string", "maxLength": 8},
            {"type": "string", "minLength": least, "maxLength": least + 4},
            {"type": "string", "pattern": self._rng.choice(PATTERNS)},
            {"type": "string", "format": self._rng.choice(FORMATS), "maxLength": 36},
        ])  # fmt: skip

    def integer(self, depth: int) -> Schema:
        low = self._rng.randint(-500, 500)
        return self._rng.choice([
            {"type": "integer", "minimum": low, "maximum": low + self._rng.randint(0, 900)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 9},
            {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
            {"type": "integer"},
        ])  # fmt: skip

    def number(self, depth: int) -> Schema:
        low = self._rng.randint(-9, 9) / 4
        return self._rng.choice([
            {"type": "number", "minimum": low, "maximum": low + 2.5},
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        ])  # fmt: skip

    def literal(self, depth: int) -> Schema:
        values = self._rng.sample([*WORDS, 7, -1.5, True, None], self._rng.randint(1, 4))
        return self._rng.choice([
            {"enum": values}, {"const": values[0]}, {"type": "boolean"}, {"type": "null"},
            {"type": "string", "enum": self._rng.sample(WORDS, 2)},
        ])  # fmt: skip

    def nullable(self, depth: int) -> Schema:
        kinds: list[Callable[[int], Schema]] = [self.string, self.integer, self.number]
        made = self._rng.choice(kinds)(depth)
        if self._rng.random() < 0.5:
            return {**made, "type": [made["type"], "null"]}
        return {"anyOf": [made, {"type": "null"}]}
