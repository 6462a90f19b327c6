"""Ask the demo model for answers to 200 random JSON schemas, streamed, and check every one.

    python benchmarks/schemas.py [--write]

At temperature 1, and without white space between the parts: the demo, which never learned to write
JSON, would spend most tokens on it. Every answer that ended must be valid by `jsonschema`, which
knows nothing of our grammar; every tenth is asked for again, not streamed, and must come to the
same tokens. The tests do this with some. 200 schemas take many minutes. The last line is one JSON
object.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import machine

from mlx_gptoss.harmony import FinishReason
from mlx_gptoss.runtime import Runtime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from json_schemas import (
    COMPACT,
    COUNT,
    QUESTION,
    mistakes,
    options,
    random_schema,
    sampled,
    streamed,
)

MAX_TOKENS = 120


def main() -> None:
    """Parse the options, ask for all answers, print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=COUNT, help="how many")
    machine.add_write(parser, "schemas")
    asked = parser.parse_args()
    results = ask(asked.schemas)
    machine.finish(machine.record("schemas", results), keep=asked.write)


def ask(count: int) -> dict[str, Any]:
    """Ask for all answers, show each, and return what came of them."""
    found, repeated, tokens, began = Counter[str](), Counter[str](), 0, time.perf_counter()
    with Runtime.open("demo", cache_bytes=0) as runtime:
        for seed in range(count):
            schema = random_schema(seed) | COMPACT
            reply = streamed(runtime, schema, seed=seed, max_tokens=MAX_TOKENS)
            tokens += reply.usage.completion_tokens
            if reply.finish_reason is FinishReason.STOP:
                outcome = "invalid" if mistakes(schema, reply.text) else "valid"
            else:
                outcome = "cut"
            found[outcome] += 1
            print(f"{seed:3} {outcome:7} {reply.text!r}", flush=True)
            if seed % 10 == 0:
                same = options(schema, seed=seed, max_tokens=MAX_TOKENS)
                again = sampled(runtime.respond(QUESTION, **same)) == sampled(reply)
                repeated["same tokens" if again else "other tokens"] += 1
    return {
        "schemas": count,
        "outcomes": dict(found),
        "asked_again": dict(repeated),
        "max_tokens": MAX_TOKENS,
        "completion_tokens": tokens,
        "wall_s": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    main()
