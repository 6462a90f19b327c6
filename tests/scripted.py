"""A stand-in model that writes a given text, and the command line run on it.

`python tests/scripted.py NAME ARGS...` is `mlx-gptoss ARGS...` with the reply SCRIPTS[NAME], for
tests that need a real process: terminals, pipes, Ctrl-C.
"""

import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

from mlx_gptoss.cache import FullCache, ModelCache
from mlx_gptoss.kernels.selection import all_definitions
from mlx_gptoss.vocabulary import N_TEXT, N_VOCAB, Special, load_vocabulary

ANSWERED = (
    "<|channel|>analysis<|message|>Two and two.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Four, naïvely: 4.<|return|>"
)
SCRIPTS = {
    "answered": ANSWERED,
    "steering": "<|channel|>final<|message|>a\x1b[31mb\r\x07c\n\td<|return|>",
    "musing": "<|channel|>analysis<|message|>hm\x1b]0;x\x07<|end|>"
    "<|start|>assistant<|channel|>final<|message|>ok<|return|>",
    "thinking": "<|channel|>analysis<|message|>" + "I wonder. " * 50,
    "slow": "<|channel|>final<|message|>One, two, three, four, five" + ", more" * 200,
}
SLOW_STEP_S = 0.05


@cache
def tokens_of(script: str) -> list[int]:
    """Token ids of a text in which `<|end|>` and the like are control tokens."""
    ids: list[int] = []
    for piece in re.split(r"(<\|\w+\|>)", script):
        special = piece.strip("<|>").upper()
        if special in Special.__members__ and piece.startswith("<|"):
            ids.append(Special[special])
        else:
            ids += load_vocabulary().encode(piece)
    assert all(id < N_TEXT or id in Special for id in ids)
    return ids


class ScriptedCache(ModelCache):
    """A real cache, of one layer with keys and values of one number."""

    def __init__(self) -> None:
        super().__init__([FullCache((1, 1, 1), mx.float32)], [0])
        self.prompt_length = 0

    def count(self, tokens: int) -> None:
        zeros = mx.zeros((1, 1, tokens, 1))
        layer = self[0]
        layer.append(zeros, zeros) if tokens == 1 else layer.extend(zeros, zeros)
        if tokens > 1:
            self.prompt_length = self.offset


class ScriptedModel:
    """Gives the next token of its script nearly all the probability, whatever it is fed.

    Attributes:
        prompt: The tokens of the last prompt; a single token is a decoding step.
        steps: How often logits were asked for.
        script: What is written after each prompt; may be replaced between turns.
    """

    def __init__(self, script: str, *, step_s: float = 0.0) -> None:
        self.config = SimpleNamespace(vocab_size=N_VOCAB, max_position_embeddings=131_072)
        self.kernels = all_definitions("a stand-in has none")
        self.script, self._step_s = script, step_s
        self.prompt: list[int] = []
        self.steps = 0

    def make_cache(self) -> ScriptedCache:
        self.prompt = []
        return ScriptedCache()

    def hidden(self, tokens: mx.array, cache: ScriptedCache) -> None:
        if tokens.shape[1] > 1:
            self.prompt = self.prompt[: cache.offset] + tokens[0].tolist()
        cache.count(tokens.shape[1])

    def next_logits(self, tokens: mx.array, cache: ScriptedCache) -> mx.array:
        self.hidden(tokens, cache)
        time.sleep(self._step_s)
        self.steps += 1
        written, script = cache.offset - cache.prompt_length, tokens_of(self.script)
        token = script[min(written, len(script) - 1)]
        return mx.where(mx.arange(N_VOCAB) == token, 100.0, 0.0)[None]

    def step_rows(self, tokens: mx.array, caches: Sequence[ScriptedCache]) -> mx.array:
        rows = zip(tokens, caches, strict=True)
        return mx.concatenate([self.next_logits(token[None, None], cache) for token, cache in rows])


def install(script: str, *, step_s: float = 0.0) -> ScriptedModel:
    """Make every model name the scripted model, in this process and for good."""
    from mlx_gptoss import library, memory, model

    scripted = ScriptedModel(script, step_s=step_s)
    library.find_model = lambda name, **_: Path(name)
    model.load_model = lambda path, **_: scripted  # type: ignore[assignment]
    memory.memory_of = lambda folder, **_: None
    return scripted


if __name__ == "__main__":
    install(SCRIPTS[sys.argv[1]], step_s=SLOW_STEP_S if sys.argv[1] == "slow" else 0.0)
    from mlx_gptoss.cli import main

    main(sys.argv[2:])
