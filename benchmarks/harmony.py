"""Time the harmony layer: parsing a token, rendering a prompt, loading the vocabulary.

    python benchmarks/harmony.py [--rounds 9] [--write]

The parser's target is 10 us a token. openai-harmony, where it is installed, is timed in the same
run on the same tokens. CPU seconds beside the clock's say more where others share the cores. The
last line is one JSON object.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

from mlx_gptoss.harmony import (
    DeveloperContent,
    HarmonyParser,
    SystemContent,
    developer,
    render_conversation_for_completion,
    system,
    user,
)
from mlx_gptoss.vocabulary import load_vocabulary

TEXT = "The capital of Norway is Oslo, населення 700 тисяч; 東京は首都です 👍🏽. " * 60
STREAM = (
    f"<|channel|>analysis<|message|>{TEXT}<|end|>"
    f"<|start|>assistant<|channel|>commentary<|message|>{TEXT}<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    f'{{"text":"{TEXT}"}}<|call|>'
)


def timed(name: str, work: Callable[[], object], *, tokens: int, rounds: int) -> dict[str, Any]:
    """Run once and then `rounds` times, print the time of a token and return it, in us."""
    work()
    timer = machine.Timer()
    for _ in range(rounds):
        timer.time(work)
    row: dict[str, Any] = {"name": name, "unit": "us/token"}
    for clock, seconds in (("wall", timer.wall_s), ("cpu", timer.cpu_s)):
        row[clock] = machine.Spread.of([s / tokens * 1e6 for s in seconds])
        print(f"{name:32} {clock:4} {row[clock].line('us/token')}")
    return row


def parse(tokens: list[int]) -> None:
    """Parse a stream token by token."""
    parser = HarmonyParser({"functions.f": "f"})
    for token in tokens:
        parser.feed(token)
    parser.finish()


def parse_upstream(tokens: list[int]) -> Callable[[], None] | None:
    """The same by openai-harmony's parser, or None where it is not installed."""
    try:
        from openai_harmony import Role, StreamableParser

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        from harmony_oracle import oracle
    except ImportError:
        return None
    encoding = oracle()

    def work() -> None:
        parser = StreamableParser(encoding, Role.ASSISTANT)
        for token in tokens:
            parser.process(token)
            _ = parser.last_content_delta

    return work


def load_time(rounds: int) -> dict[str, Any]:
    """Print and return the seconds to the first encoded text, in new processes."""
    code = (
        "import time; import mlx_gptoss.vocabulary as v; begin = time.perf_counter(); "
        "v.load_vocabulary().encode('Hello'); print(time.perf_counter() - begin)"
    )
    run = [sys.executable, "-c", code]
    spread = machine.Spread.of([float(subprocess.check_output(run)) for _ in range(rounds)])
    name = "load vocabulary, first encode"
    print(f"{name:32} wall {spread.line('s')}")
    return {"name": name, "unit": "s", "wall": spread}


def main() -> None:
    """Parse the options, run all rows, print the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each")
    machine.add_write(parser, "harmony")
    asked = parser.parse_args()
    tokens = load_vocabulary().encoding.encode(STREAM, allowed_special="all")
    sides = {"parse": (lambda: parse(tokens), len(tokens))}
    if upstream := parse_upstream(tokens):
        sides["parse, openai-harmony"] = (upstream, len(tokens))
    messages = [
        system(SystemContent(date="2026-01-01")),
        developer(DeveloperContent(instructions=TEXT)),
        user(TEXT),
    ]
    prompt = render_conversation_for_completion(messages)
    sides["render"] = (lambda: render_conversation_for_completion(messages), len(prompt))
    rows = [
        timed(name, work, tokens=count, rounds=asked.rounds)
        for name, (work, count) in sides.items()
    ]
    rows.append(load_time(asked.rounds))
    results = {"tokens": len(tokens), **{row.pop("name"): row for row in rows}}
    machine.finish(machine.record("harmony", results), keep=asked.write)


if __name__ == "__main__":
    main()
