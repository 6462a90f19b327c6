"""A turn's events, written where they belong while they arrive."""

import json
import sys
from dataclasses import asdict
from enum import Enum

import click

from mlx_gptoss.cli.console import is_terminal, size
from mlx_gptoss.harmony import Event, MessageDone, PreambleDelta, ReasoningDelta, TextDelta
from mlx_gptoss.turn import Reply
from mlx_gptoss.vocabulary import TextDecoder, load_vocabulary

# What a model writes must not steer the terminal: control characters become visible.
_CONTROLS = {i: "\N{REPLACEMENT CHARACTER}" for i in (*range(32), *range(127, 160))}
_CONTROLS = {i: shown for i, shown in _CONTROLS.items() if chr(i) not in "\n\t"}


class Reasoning(Enum):
    """Where the model's reasoning goes."""

    DIMMED = "dimmed on stdout, before the answer"
    STDERR = "stderr"
    HIDDEN = "nowhere"


def reasoning_place(*, show_reasoning: bool) -> Reasoning:
    """Where reasoning goes by default: to people who watch, and to nobody else."""
    if show_reasoning:
        return Reasoning.STDERR
    return Reasoning.DIMMED if is_terminal(sys.stdout) else Reasoning.HIDDEN


class Printer:
    """Prints reasoning and answer of one turn.

    Args:
        reasoning: Where the reasoning goes.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self._reasoning = reasoning
        self._on_terminal = is_terminal(sys.stdout)
        self._open = False  # stdout is inside a line
        self._thought = False  # reasoning was shown and no answer since
        self._decoder, self._decoded = TextDecoder(), 0

    def event(self, event: Event) -> None:
        """Print what an event adds."""
        match event:
            case TextDelta(text):
                if self._thought and self._reasoning is Reasoning.DIMMED:
                    click.echo("\n" if self._open else "")
                self._thought = False
                self._write(text)
            case ReasoningDelta(text) | PreambleDelta(text):
                self._thought = True
                if self._reasoning is Reasoning.DIMMED:
                    self._write(text, dim=True)
                elif self._reasoning is Reasoning.STDERR:
                    shown = _harmless(text) if is_terminal(sys.stderr) else text
                    click.secho(shown, dim=True, nl=False, err=True)
            case MessageDone() if self._thought and self._reasoning is Reasoning.STDERR:
                click.echo(err=True)
            case _:
                pass

    def tokens(self, tokens: list[int]) -> None:
        """Print what is new of a turn's tokens, control tokens as their spelling."""
        new = load_vocabulary().decode_bytes(tokens[self._decoded :])
        self._decoded = len(tokens)
        self._write(self._decoder.feed(new))

    def close(self) -> None:
        """Print what a cut-off character left, and end the last line."""
        self._write(self._decoder.finish())
        if self._open:
            click.echo()
            self._open = False

    def _write(self, text: str, *, dim: bool = False) -> None:
        if not text:
            return
        self._open = not text.endswith("\n")
        shown = _harmless(text) if self._on_terminal else text
        click.echo(click.style(shown, dim=True) if dim else shown, nl=False)


def _harmless(text: str) -> str:
    return text.translate(_CONTROLS)


def stats_line(reply: Reply) -> str:
    """What a reply cost, in one line."""
    usage, timing = reply.usage, reply.timing
    prompt = f"prompt {usage.prompt_tokens} tok"
    if usage.cached_tokens:
        prompt += f" ({usage.cached_tokens} cached)"
    if timing.prefill_tok_per_s is not None:
        prompt += f" {_rate(timing.prefill_tok_per_s)}"
    output = f"output {usage.completion_tokens} tok ({usage.reasoning_tokens} reasoning)"
    if timing.decode_tok_per_s is not None:
        output += f" {_rate(timing.decode_tok_per_s)}"
    parts = [prompt, output]
    if timing.ttft_s is not None:
        parts.append(f"ttft {timing.ttft_s:.2f} s")
    parts += [f"peak {size(reply.peak_memory_bytes)}", reply.finish_reason]
    return " | ".join(parts)


def _rate(tok_per_s: float) -> str:
    return f"{tok_per_s:.0f} tok/s" if tok_per_s >= 10 else f"{tok_per_s:.2f} tok/s"


def as_json(reply: Reply, *, model: str, load_s: float) -> str:
    """A reply as one JSON object."""
    return json.dumps(
        {
            "text": reply.text,
            "reasoning": reply.reasoning,
            "tool_calls": [
                {"name": call.name, "arguments": call.arguments} for call in reply.tool_calls
            ],
            "finish_reason": reply.finish_reason,
            "usage": asdict(reply.usage),
            "timing": {"load_s": load_s, **asdict(reply.timing)},
            "peak_memory_bytes": reply.peak_memory_bytes,
            "seed": reply.seed,
            "model": model,
        },
        ensure_ascii=False,
    )
