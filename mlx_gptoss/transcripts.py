"""Stored answers: what a model with given weights says to a given prompt, token by token.

`data/transcripts.json` maps a digest of the weights to a prompt, the tokens that were chosen
greedily, and their log-probabilities. `benchmarks/record_transcript.py` writes it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint import Checkpoint
from mlx_gptoss.model import Model
from mlx_gptoss.unpack import numbers

FILE = "transcripts.json"


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A greedy answer: ids of the prompt, ids chosen, and the log-probability of each."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def weights_digest(checkpoint: Checkpoint) -> str | None:
    """One sha256 over the hashes of all tensors; None without a manifest."""
    if checkpoint.manifest is None:
        return None
    tensors: Mapping[str, str] = checkpoint.manifest["tensors"]
    text = "\n".join(f"{name} {tensors[name]}" for name in sorted(tensors))
    return hashlib.sha256(text.encode()).hexdigest()


def stored_transcript(digest: str | None) -> Transcript | None:
    """The answer that was stored for these weights, if one was."""
    path = files("mlx_gptoss") / "data" / FILE
    if digest is None or not path.is_file():
        return None
    found: dict[str, Any] | None = json.loads(path.read_text()).get(digest)
    return Transcript(**{name: tuple(value) for name, value in found.items()}) if found else None


def score(model: Model, transcript: Transcript) -> Transcript:
    """Feed a transcript, the answer token by token, and say what this model would have chosen.

    Args:
        model: the model.
        transcript: with the answer that is fed.

    Returns:
        The same prompt, the first choice at each place, and the log-probability of each of the
        transcript's own tokens.
    """
    cache, fed = model.make_cache(), list(transcript.prompt)
    tokens, logprobs = [], []
    for token in transcript.tokens:
        logits = numbers(model.next_logits(mx.array([fed], mx.int32), cache))[0]
        tokens.append(int(logits.argmax()))
        top = logits.max()
        logprobs.append(float(logits[token] - top - np.log(np.exp(logits - top).sum())))
        fed = [token]
    return Transcript(prompt=transcript.prompt, tokens=tuple(tokens), logprobs=tuple(logprobs))


def agreement(one: Transcript, other: Transcript) -> tuple[float, float]:
    """Share of equal choices, and mean difference of log-probabilities."""
    top1 = float((np.array(one.tokens) == other.tokens).mean())
    gap = float(np.abs(np.subtract(one.logprobs, other.logprobs)).mean())
    return top1, gap if np.isfinite(gap) else float("inf")
