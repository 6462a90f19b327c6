"""Scores the shipped demo model on the fixed questions, with our own runtime.

    python -m benchmarks.demo_model.evaluate [--seeds N] [--out SCORES.json]

Every turn is generated freely, token by token, by the runtime's model in its default precision,
eight turns at a time, and parsed like any other. Each question is asked once at temperature 0 and N
times at temperature 1. A tool question is right when the call has the right name and arguments and
the answer says what the tool's result says.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.demo_model.cases import Case, cases
from mlx_gptoss.demo import DEMO_SHA256, TOKEN_IDS, demo_model_path, read_compact
from mlx_gptoss.harmony import (
    STOP_TOKENS,
    Event,
    HarmonyParser,
    Message,
    MessageDone,
    ReasoningEffort,
    Repair,
    SystemContent,
    TextDelta,
    ToolCallDone,
    render_conversation_for_completion,
    system,
    tool_result,
)
from mlx_gptoss.library import model_store
from mlx_gptoss.matrix import Matrix
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.reference import final_logits
from mlx_gptoss.sampling import SamplingParams, SamplingRows, gumbel

BATCH = 8
MAX_TOKENS = 160
DATE = "2026-11-21"
EFFORTS = tuple(ReasoningEffort)


@dataclass
class Trial:
    """A case at one effort and temperature, and what came of it so far."""

    case: Case
    effort: ReasoningEffort
    seed: int | None  # None is temperature 0
    messages: list[Message]
    events: list[Event] = field(default_factory=list)
    reasoning_tokens: int = 0

    @property
    def calls(self) -> list[ToolCallDone]:
        """All calls, in order."""
        return [event for event in self.events if isinstance(event, ToolCallDone)]

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def well_formed(self) -> bool:
        """The parser had nothing to repair, and the model stopped by itself."""
        return not any(isinstance(event, Repair) for event in self.events) and bool(self.text)

    @property
    def right(self) -> bool:
        """The answer says what it must, after exactly the calls it needs."""
        wanted = [self.case.call] if self.case.call else []
        said = self.text.lower()
        called = [(call.name, _object(call.arguments)) for call in self.calls]
        return called == wanted and any(words.lower() in said for words in self.case.says)

    def prompt(self) -> list[int]:
        """Tokens that let the model speak next."""
        start = system(SystemContent(date=DATE, effort=self.effort))
        return render_conversation_for_completion([start, *self.messages])

    def hear(self, tokens: Sequence[int]) -> None:
        """Take a turn of the model."""
        offered = {f"functions.{tool.name}": tool.name for tool in self.case.tools}
        parser = HarmonyParser(offered)
        events = [event for token in tokens for event in parser.feed(token)]
        events += parser.finish()
        done = [event for event in events if isinstance(event, MessageDone)]
        if not self.events:
            self.reasoning_tokens = len(done[0].tokens) if done else 0
        self.events += events
        self.messages += [event.message for event in done]

    def answer_call(self) -> bool:
        """Give the tool's result, if the first turn ended in a call that the case foresees."""
        if not self.calls or not self.case.result:
            return False
        self.messages.append(tool_result(self.calls[0].recipient, self.case.result))
        return True


def _object(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


class Speaker:
    """Generates several turns at a time, over the tokens that the model was trained on.

    The other 199,426 have logits so low (`tests/test_demo.py`) that they are never sampled; without
    their rows a step costs a tenth. What is sampled is what `Engine` samples.
    """

    def __init__(self, model: Model):
        self.model = model
        self.token_ids = mx.array(read_compact()[TOKEN_IDS])
        self.unembedding = Matrix(weight=model.unembedding.weight[self.token_ids])

    def speak(self, trials: Sequence[Trial]) -> None:
        """One turn of every trial; prompts of like length share a batch."""
        waiting = sorted(((trial.prompt(), trial) for trial in trials), key=lambda p: len(p[0]))
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            turns = self.generate([p for p, _ in part], [trial.seed for _, trial in part])
            for (_, trial), tokens in zip(part, turns, strict=True):
                trial.hear(tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int | None]
    ) -> list[list[int]]:
        """Sampled tokens of each prompt up to its stop token; without a seed, the likeliest."""
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        cache = self.model.make_cache(len(prompts), left_padding=padding)
        rows = SamplingRows.pack(
            [SamplingParams(temperature=float(s is not None), seed=s or 0) for s in seeds]
        )
        lengths = mx.array([len(prompt) for prompt in prompts])
        tokens = mx.array([[0] * n + list(p) for n, p in zip(padding, prompts, strict=True)])
        written: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for step in range(MAX_TOKENS):
            hidden = self.model.hidden(tokens, cache)[:, -1:]
            logits = final_logits(hidden, self.unembedding)[:, 0]
            chosen = self.token_ids[self.sample(logits, lengths + step, rows)]
            for row in list(running):
                token = chosen[row].item()
                assert isinstance(token, int)
                written[row].append(token)
                running -= {row} if token in STOP_TOKENS else set()
            if not running:
                break
            tokens = chosen[:, None]
        return written

    def sample(self, logits: mx.array, positions: mx.array, rows: SamplingRows) -> mx.array:
        """Indices (B) of the tokens drawn from logits (B, N), with the noise of `sampling`."""
        noise = gumbel(rows.key, positions, ids=self.token_ids[None].astype(mx.uint32))
        return mx.argmax(logits + mx.where(rows.temperature > 0, noise, 0), axis=-1)


@dataclass
class Score:
    """Counts of one kind at one temperature."""

    asked: int = 0
    right: int = 0
    well_formed: int = 0

    def add(self, trial: Trial) -> None:
        """Count one trial."""
        self.asked += 1
        self.right += trial.right
        self.well_formed += trial.well_formed


def evaluate(model: Model, *, seeds: int, every: int) -> list[Trial]:
    """Ask all cases, or one in `every`; the efforts take turns over them."""
    trials = [
        Trial(case, EFFORTS[number % 3], seed, list(case.messages))
        for number, case in enumerate(list(cases())[::every])
        for seed in [None, *range(seeds)]
    ]
    speaker = Speaker(model)
    speaker.speak(trials)
    speaker.speak([trial for trial in trials if trial.answer_call()])
    return trials


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Counts by kind and temperature, and the mean length of the reasoning by effort."""
    scores: dict[str, dict[str, Score]] = defaultdict(lambda: {"0": Score(), "1": Score()})
    lengths: dict[str, list[int]] = defaultdict(list)
    for trial in trials:
        temperature = "0" if trial.seed is None else "1"
        for kind in (trial.case.kind, "all"):
            scores[kind][temperature].add(trial)
        lengths[trial.effort].append(trial.reasoning_tokens)
    return {
        "right": {
            kind: {t: f"{score.right}/{score.asked}" for t, score in by_temperature.items()}
            for kind, by_temperature in scores.items()
        },
        "well_formed": {t: f"{s.well_formed}/{s.asked}" for t, s in scores["all"].items()},
        "reasoning_tokens": {effort: round(sum(n) / len(n), 1) for effort, n in lengths.items()},
    }


def show(trial: Trial) -> str:
    """A wrong trial in a line."""
    temperature = "T = 0" if trial.seed is None else f"T = 1, seed {trial.seed}"
    said = " | ".join(
        str(message.content) for message in trial.messages[len(trial.case.messages) :]
    )
    asked = trial.case.messages[-1].content
    return f"{trial.case.kind}, {trial.effort}, {temperature}: {asked!r} -> {said!r}"


def main() -> None:
    """Evaluate, print wrong replies, a table and one JSON line, and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="trials of each case at T = 1")
    parser.add_argument("--every", type=int, default=1, help="ask one case in so many")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.time()
    model = load_model(demo_model_path(model_store()))
    trials = evaluate(model, seeds=arguments.seeds, every=arguments.every)
    record = {
        "model_sha256": DEMO_SHA256,
        "seeds": arguments.seeds,
        **summary(trials),
        "machine": f"{platform.machine()} {platform.system()}, MLX {mx.__version__}",
        "wall_s": round(time.time() - began, 1),
    }
    for trial in trials:
        if not trial.right:
            print(show(trial))
    print(f"{'kind':18}{'T = 0':>10}{'T = 1':>10}")
    for kind, right in record["right"].items():
        print(f"{kind:18}{right['0']:>10}{right['1']:>10}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
