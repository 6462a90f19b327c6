"""Time the harmony layer: parsing a token, rendering a prompt, loading the vocabulary.

    python benchmarks/harmony.py

The parser's target is 10 us a token. openai-harmony, where it is installed, is timed in the same
run on the same tokens. The last line is one JSON object.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

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

ROUNDS = 9
TEXT = "The capital of Norway is Oslo, населення 700 тисяч; 東京は首都です 👍🏽. " * 60
STREAM = (
    f"<|channel|>analysis<|message|>{TEXT}<|end|>"
    f"<|start|>assistant<|channel|>commentary<|message|>{TEXT}<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    f'{{"text":"{TEXT}"}}<|call|>'
)


def timed(work: Callable[[], object]) -> list[float]:
    """Seconds of ROUNDS runs, after one that is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def row(name: str, seconds: list[float], *, per: int, unit: str) -> dict[str, object]:
    """Print and return median, smallest and largest time of one of `per` things, in us."""
    each = sorted(s / per * 1e6 for s in seconds)
    found = {"name": name, "unit": unit, "median": round(statistics.median(each), 3)}
    found |= {"min": round(each[0], 3), "max": round(each[-1], 3)}
    print(f"{name:34} {found['median']:>10} {unit}   ({found['min']} .. {found['max']})")
    return found


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


def load_time() -> list[float]:
    """Seconds from nothing to the first encoded text, each in a new process."""
    code = (
        "import time; import mlx_gptoss.vocabulary as v; begin = time.perf_counter(); "
        "v.load_vocabulary().encode('Hello'); print(time.perf_counter() - begin)"
    )
    run = [sys.executable, "-c", code]
    return [float(subprocess.check_output(run)) for _ in range(5)]


def main() -> None:
    """Run all rows."""
    tokens = load_vocabulary().encoding.encode(STREAM, allowed_special="all")
    rows = [row("parse", timed(lambda: parse(tokens)), per=len(tokens), unit="us/token")]
    if upstream := parse_upstream(tokens):
        seconds = timed(upstream)
        rows.append(row("parse, openai-harmony", seconds, per=len(tokens), unit="us/token"))
    messages = [
        system(SystemContent(date="2026-01-01")),
        developer(DeveloperContent(instructions=TEXT)),
        user(TEXT),
    ]
    count = len(render_conversation_for_completion(messages))
    seconds = timed(lambda: render_conversation_for_completion(messages))
    rows.append(row("render", seconds, per=count, unit="us/token"))
    rows.append(row("load vocabulary, first encode", load_time(), per=1, unit="us"))
    record = {
        "benchmark": "harmony",
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "tiktoken": version("tiktoken"),
        "tokens": len(tokens),
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
