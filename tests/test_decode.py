"""The compiled decode step gives the model's own tokens, across merges, windows and dropped steps.

Here every operation runs its definition; `test_kernels_demo.py` runs the kernels.
"""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny import TinyShape
from weights import tiny_model

from mlx_gptoss.decode import Decoder
from mlx_gptoss.decode_state import ROWS
from mlx_gptoss.kernels.selection import all_definitions
from mlx_gptoss.model import Model
from mlx_gptoss.sampling import SamplingParams, SamplingRows, packed, sample

VOCAB = 320


@pytest.fixture(scope="module")
def model() -> Model:
    shape = TinyShape(
        layers=3, hidden=96, inter=32, q_heads=8, kv_heads=2, experts=8, chosen=3, vocab=VOCAB
    )
    return tiny_model(shape)


@pytest.fixture(scope="module")
def decoder(model: Model) -> Decoder:
    allowed = mx.arange(VOCAB) % 7 != 3
    return Decoder(
        model, kernels=all_definitions("the definitions are tested here"), allowed=allowed
    )


def prompts(rows: int, count: int) -> mx.array:
    return mx.array(np.random.default_rng(rows).integers(0, VOCAB, (rows, count)), dtype=mx.int32)


def model_tokens(
    model: Model, prompt: mx.array, count: int, params: list[SamplingParams]
) -> list[list[int]]:
    """The tokens of `Model` and `sample`, one list for each step."""
    cache, rows = model.make_cache(prompt.shape[0]), SamplingRows.pack(params)
    model.hidden(prompt[:, :-1], cache)
    token, found = prompt[:, -1], []
    for _ in range(count):
        logits = model.next_logits(token[:, None], cache)
        positions = mx.full((prompt.shape[0],), cache.offset, dtype=mx.int32)
        token = sample(logits, positions, rows=rows, allowed=mx.arange(VOCAB) % 7 != 3)
        found.append(token.tolist())
    return found


def start(decoder: Decoder, prompt: mx.array, params: list[SamplingParams]):
    cache = decoder.model.make_cache(prompt.shape[0])
    decoder.model.hidden(prompt[:, :-1], cache)
    return decoder.start(cache, prompt[:, -1], sampling=params), cache


def tokens_of(decoder: Decoder, decoding, count: int) -> list[list[int]]:
    found = []
    for _ in range(count):
        decoder.advance([decoding])
        found.append(decoding.state.token.tolist())
    return found


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Without `mx.compile`: the CPU's compiler takes a second for each fused operation."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("length", [2, 129])
@pytest.mark.usefixtures("uncompiled")
def test_greedy_tokens_across_merges(model: Model, decoder: Decoder, length: int) -> None:
    """One merge and a bit, so that ring rows are overwritten and the append segment starts anew."""
    prompt, params = prompts(1, length), [SamplingParams(temperature=0, seed=0)]
    decoding, _ = start(decoder, prompt, params)
    count = ROWS + 12
    assert tokens_of(decoder, decoding, count) == model_tokens(model, prompt, count, params)


def test_compiled_tokens_and_one_trace(model: Model, decoder: Decoder) -> None:
    """The same tokens compiled; another generation of the same capacity replays the trace."""
    before = decoder.traces
    for seed in (0, 1):
        prompt, params = prompts(1, 100) - seed, [SamplingParams(temperature=0, seed=seed)]
        decoding, _ = start(decoder, mx.abs(prompt), params)
        assert tokens_of(decoder, decoding, 20) == model_tokens(model, mx.abs(prompt), 20, params)
    assert decoder.traces == before + 1


def test_compiled_in_two_parts_with_a_mask_for_each_token(model: Model, decoder: Decoder) -> None:
    """The mask is made after the layers are launched; no other one is traced."""
    before, prompt = decoder.traces, prompts(1, 100)
    decoding, cache = start(decoder, prompt, [SamplingParams(temperature=0, seed=0)])
    found, expected, fed = [], [], prompt[:, -1:]
    check = model.make_cache()
    model.hidden(prompt[:, :-1], check)
    for at in range(12):
        decoder.feed([decoding])
        flags = (np.arange(VOCAB) % 5 == at % 5) & (np.arange(VOCAB) != 77)
        decoding.allowed = packed(flags)
        decoder.advance([decoding])
        decoding.keep()
        found.append(int(decoding.state.token))
        logits = model.next_logits(fed, check)
        both = mx.array(flags) & (mx.arange(VOCAB) % 7 != 3)
        expected.append(int(mx.argmax(mx.where(both, logits, -mx.inf))))
        fed = mx.array([[expected[-1]]])
    assert found == expected and len(set(found)) > 4
    assert decoder.traces == before + 1
    decoding.finish()
    assert cache.offset == check.offset


@pytest.mark.usefixtures("uncompiled")
def test_rows_of_a_batch_draw_their_own_tokens(model: Model, decoder: Decoder) -> None:
    params = [
        SamplingParams(temperature=0.8, seed=2**63 + 5),
        SamplingParams(temperature=0, seed=1),
        SamplingParams(temperature=1.5, seed=2**32 - 1),
    ]
    prompt = prompts(3, 70)
    decoding, _ = start(decoder, prompt, params)
    assert tokens_of(decoder, decoding, 30) == model_tokens(model, prompt, 30, params)


@pytest.mark.usefixtures("uncompiled")
def test_filters_of_every_kind_side_by_side(model: Model, decoder: Decoder) -> None:
    """A greedy row's top-p changes nothing; a top-k beyond the vocabulary is none."""
    params = [
        SamplingParams(temperature=3, top_k=4, seed=1),
        SamplingParams(temperature=3, top_p=0.5, seed=2),
        SamplingParams(temperature=3, min_p=0.2, seed=3),
        SamplingParams(temperature=2, top_k=30, top_p=0.8, min_p=0.01, seed=4),
        SamplingParams(temperature=0, top_p=0.1, seed=5),
        SamplingParams(temperature=1.5, top_k=2**40, seed=6),
    ]
    prompt = prompts(6, 33)
    decoding, _ = start(decoder, prompt, params)
    tokens = tokens_of(decoder, decoding, 30)
    assert tokens == model_tokens(model, prompt, 30, params)
    bare = [replace(p, top_k=None, top_p=1, min_p=None) for p in params]
    unfiltered = np.array(tokens_of(decoder, start(decoder, prompt, bare)[0], 30))
    changed = (np.array(tokens) != unfiltered).any(axis=0)
    assert changed.tolist() == [True] * 4 + [False] * 2


@pytest.mark.usefixtures("uncompiled")
def test_log_probabilities_are_of_the_allowed_tokens(model: Model, decoder: Decoder) -> None:
    prompt, params = prompts(2, 9), [SamplingParams(temperature=1, seed=s) for s in (4, 5)]
    decoding, _ = start(decoder, prompt, params)
    decoder.advance([decoding])
    logits = model(prompt)[:, -1]
    masked = mx.where(mx.arange(VOCAB) % 7 != 3, logits, -mx.inf)
    logprobs = masked - mx.logsumexp(masked, axis=-1, keepdims=True)
    token = decoding.state.token
    expected = mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    assert mx.abs(decoding.state.rows.logprob - expected).max().item() < 1e-4


@pytest.mark.usefixtures("uncompiled")
def test_a_step_ahead_can_be_dropped(model: Model, decoder: Decoder) -> None:
    """The cache is brought to the state before the last step, and the next turn goes on from it."""
    prompt, params = prompts(1, 40), [SamplingParams(temperature=0, seed=0)]
    decoding, cache = start(decoder, prompt, params)
    fed = [int(prompt[0, -1])] + [t[0] for t in tokens_of(decoder, decoding, 20)]
    decoder.advance([decoding])
    decoding.finish()
    assert cache.offset == 39 + 20
    after = mx.array([[fed[-1], 7, 8]])
    text = mx.concatenate([prompt[:, :-1], mx.array([fed[:-1]]), after], axis=1)
    difference = mx.abs(model(after, cache) - model(text)[:, -3:]).max().item()
    assert difference < 3e-4
