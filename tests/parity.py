"""The tiny checkpoint and prompts of the parity goldens, and how logits are compared."""

from pathlib import Path

import numpy as np
from tiny import TinyShape

GOLDENS = Path(__file__).parent / "goldens"
SEED = 0
SHAPE = TinyShape(layers=4, hidden=192, inter=96, q_heads=4, kv_heads=2, experts=8, vocab=272)
SHORT, LONG = 300, 6000  # tokens: past two windows; past YaRN's original context of 4,096
RANGES = ((0, 128), (128, 1024), (1024, 4096), (4096, LONG))


def prompt(count: int) -> np.ndarray:
    """The first `count` tokens of the one random text."""
    return np.random.default_rng(SEED).integers(0, SHAPE.vocab, LONG)[:count]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(truth: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Largest difference of logits (N, V), mean KL(truth || logits), share of equal best tokens."""
    p, q = log_softmax(truth), log_softmax(logits)
    return {
        "max_difference": float(np.abs(truth - logits).max()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((truth.argmax(-1) == logits.argmax(-1)).mean()),
    }
