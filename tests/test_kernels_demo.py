"""The demo model generates with every kernel emulated, token for token what plain MLX generates."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import attention, moe
from mlx_gptoss.conversation import read_conversation
from mlx_gptoss.decode import Decoder
from mlx_gptoss.decode_state import ROWS
from mlx_gptoss.demo import demo_model_path, read_compact
from mlx_gptoss.engine import Engine, Generation
from mlx_gptoss.harmony import ResponseFormat
from mlx_gptoss.harmony.ledger import prepare_prompt
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import KernelSet, all_kernels
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.model import Model, load_model
from mlx_gptoss.rules import TurnRules
from mlx_gptoss.sampling import SamplingParams, SamplingRows, packed, sample
from mlx_gptoss.structured import Guide
from mlx_gptoss.vocabulary import Special, load_vocabulary

TOKENS = 200
PROMPT_KERNELS = {
    "attention_window_prefill",
    "expert_dispatch",
    "extend_ring",
    "qkv_rope",
    "rms_norm",
    "route_prefill",
    "sum_pairs",
    "swiglu_pairs",
}
BATCH_KERNELS = {
    "expert_groups",
    "experts_down_grouped",
    "experts_sum",
    "experts_swiglu_grouped",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(demo_model_path(tmp_path_factory.mktemp("store")), dtype="float32")


@pytest.fixture(scope="module")
def trained_ids() -> np.ndarray:
    """The ids the demo was trained on, and as many others as fill the last 64 logits."""
    ids = read_compact()["token_ids"].tolist()
    others = (i for i in range(1000, 2000) if i not in ids)
    return np.sort([*ids, *(next(others) for _ in range(-len(ids) % 64))])


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Emulated kernels run when they are called, which a trace is not."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def prompt() -> list[int]:
    encode = load_vocabulary().encode
    question = encode("Hello, what is the capital of France?")
    return [200006, *encode("user"), 200008, *question, 200007, 200006, *encode("assistant")]


GREEDY = SamplingParams(temperature=0, seed=0)


def by_mlx(
    model: Model, tokens: list[int], count: int, params: SamplingParams = GREEDY
) -> list[int]:
    cache, fed, rows = model.make_cache(), mx.array([tokens]), SamplingRows.pack([params])
    allowed = mx.ones((model.config.vocab_size,), mx.bool_)
    found: list[int] = []
    for _ in range(count):
        logits, position = model.next_logits(fed, cache), mx.array([cache.offset])
        found.append(int(sample(logits, position, rows=rows, allowed=allowed)))
        fed = mx.array([[found[-1]]])
    return found


def by_kernels(
    model: Model, tokens: list[int], count: int, params: SamplingParams = GREEDY
) -> tuple[list[int], list[str]]:
    """Tokens of the decode step, and the kernel of each launch."""
    allowed = mx.ones((model.config.vocab_size,), mx.uint8)
    decoder = Decoder(model, kernels=all_kernels(), allowed=allowed)
    cache = model.make_cache()
    model.hidden(mx.array([tokens[:-1]]), cache)
    found = []
    with emulate(mode="plain") as session:
        decoding = decoder.start(cache, mx.array(tokens[-1:]), sampling=[params])
        for _ in range(count):
            decoder.advance([decoding])
            found.append(int(decoding.state.token))
    return found, [report.kernel for report in session.reports]


def test_a_conversation_is_token_identical(demo: Model, trained_ids: np.ndarray) -> None:
    """Past the window of 128 and past a merge, over the rows of the vocabulary that were trained.

    The other 199,424 rows are one row again and again; emulating them takes a second a token.
    """
    model, tokens = of_trained_rows(demo, trained_ids, prompt())
    assert len(tokens) + TOKENS > ROWS + demo.config.sliding_window // 2
    found, kernels = by_kernels(model, tokens, TOKENS)
    assert found == by_mlx(model, tokens, TOKENS)
    text = load_vocabulary().decode([int(trained_ids[row]) for row in found])
    assert "Paris" in text
    # 6 kernels in a sliding layer, 7 in a full one, 3 besides; two layers of each kind
    assert len(kernels) == TOKENS * (2 * 6 + 2 * 7 + 3)
    assert used(kernels) == set(KERNELS) - PROMPT_KERNELS - BATCH_KERNELS - {"sample_filtered"}


def test_filtered_draws_are_token_identical(demo: Model, trained_ids: np.ndarray) -> None:
    model, tokens = of_trained_rows(demo, trained_ids, prompt())
    params = SamplingParams(temperature=40, top_k=9, seed=8)
    found, kernels = by_kernels(model, tokens, 12, params)
    assert found == by_mlx(model, tokens, 12, params)
    assert found != by_mlx(model, tokens, 12)
    assert {"sample_filtered"} == used(kernels) & {"sample_filtered", "sample_token"}


def test_a_guided_turn_beside_a_free_one(demo: Model, trained_ids: np.ndarray) -> None:
    """Held to a schema by llguidance, in the steps of a turn that is not; each as by MLX alone."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Rome", "Paris"]}},
        "required": ["capital"],
        "x-guidance": {"whitespace_pattern": ""},
    }
    answers = ResponseFormat(name="x", schema=schema)
    rules = TurnRules(answers=answers, calls={}, must_call=False)
    asked = read_conversation("What is the capital of France?", date="2026-01-01", reasoning="low")
    question = [*prepare_prompt(asked.messages).tokens, int(Special.RETURN)]
    model, (*tokens, end) = of_trained_rows(demo, trained_ids, question)

    class Cut:
        """The guide of a turn, of the rows of the vocabulary that are there."""

        def __init__(self) -> None:
            self._guide = Guide(rules)

        def allowed(self) -> np.ndarray:
            bits = np.unpackbits(self._guide.allowed().view(np.uint8), bitorder="little")
            return packed(bits[trained_ids])

        def accept(self, token: int) -> None:
            self._guide.accept(int(trained_ids[token]))

    def turns(engine: Engine) -> list[Generation]:
        options = {"stop": [end], "max_tokens": 30}
        return [
            engine.generate(tokens, sampling=SamplingParams(seed=4), guide=Cut(), **options),
            engine.generate(tokens[2:], sampling=SamplingParams(top_p=0.95, seed=5), **options),
        ]

    alone = [list(turn) for turn in turns(Engine(model))]
    model.kernels = all_kernels()
    taken: list[list[int]] = [[], []]
    with emulate(mode="plain") as session:
        engine = Engine(model)
        together = turns(engine)
        while any(turn.finish is None for turn in together):
            engine.launch(together)
            for row, turn in zip(taken, together, strict=True):
                row += [token for token in [next(turn, None)] if token is not None]
    assert taken == alone
    texts = [load_vocabulary().decode([int(trained_ids[t]) for t in row]) for row in taken]
    assert texts[0].endswith('<|message|>{"capital":"Paris"}<|return|>')
    assert texts[1].endswith("Paris.<|return|>")
    chosen = sum("gptoss_unembed_" in report.kernel for report in session.reports)
    assert chosen < max(map(len, taken)) + 2, "one choice a round, for both"


def used(launched: list[str]) -> set[str]:
    """The stems; one begins like another."""
    return {max((s for s in KERNELS if f"gptoss_{s}_" in name), key=len) for name in launched}


def of_trained_rows(
    demo: Model, trained_ids: np.ndarray, tokens: Sequence[int]
) -> tuple[Model, list[int]]:
    """The demo with the rows of its vocabulary that were trained, and what rows tokens are."""
    model, rows = copy(demo), mx.array(trained_ids)
    model.embedding = replace(demo.embedding, weight=demo.embedding.weight[rows])
    model.unembedding = replace(demo.unembedding, weight=demo.unembedding.weight[rows])
    model.config = replace(demo.config, vocab_size=rows.size)
    place = {int(token): row for row, token in enumerate(trained_ids)}
    return model, [place[token] for token in tokens]


def as_on_metal(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts take the operations that Metal would run; MLX's own run on the CPU all the same."""
    model.kernels = all_kernels()
    monkeypatch.setattr(moe, "on_cpu", lambda: False)
    monkeypatch.setattr(attention, "on_cpu", lambda: False)


@pytest.mark.parametrize("chunks", [[200], [70, 1, 129]], ids=str)
def test_a_prompt_is_the_same(
    demo: Model, trained_ids: np.ndarray, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks on both sides of the window."""
    model, tokens = of_trained_rows(demo, trained_ids, (prompt() * 20)[:260])
    want = model.next_logits(mx.array([tokens[: sum(chunks)]]))
    as_on_metal(model, monkeypatch)
    cache, parts = model.make_cache(), np.split(tokens, np.cumsum(chunks))
    with emulate(mode="plain") as session:
        for part in parts[: len(chunks) - 1]:
            model.hidden(mx.array(part)[None], cache)
        got = model.next_logits(mx.array(parts[len(chunks) - 1])[None], cache)
    assert used([report.kernel for report in session.reports]) == PROMPT_KERNELS
    assert mx.abs(got - want).max().item() < 2e-5 * mx.abs(want).max().item()
    assert mx.argmax(got).item() == mx.argmax(want).item()


@pytest.mark.parametrize("stem", ["all of them", *sorted(PROMPT_KERNELS)])
def test_a_prompt_without_a_kernel_is_the_same(
    demo: Model, trained_ids: np.ndarray, stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may fall back to its definition, on Metal, too; the others still run."""
    model, tokens = of_trained_rows(demo, trained_ids, (prompt() * 3)[:45])
    want = model.next_logits(mx.array([tokens[:45]]))
    as_on_metal(model, monkeypatch)
    left_out = {stem} & PROMPT_KERNELS or set(KERNELS)
    model.kernels = KernelSet.of(dict.fromkeys(left_out, "for the test"))
    cache = model.make_cache()
    with emulate(mode="plain") as session:
        model.hidden(mx.array([tokens[:20]]), cache)
        got = model.next_logits(mx.array([tokens[20:45]]), cache)
    assert used([report.kernel for report in session.reports]) == PROMPT_KERNELS - left_out
    assert mx.abs(got - want).max().item() < 2e-5 * mx.abs(want).max().item()


def test_a_prompt_in_bfloat16(
    demo: Model, tmp_path: Path, trained_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product is rounded here, as on Metal; plain MLX on the CPU keeps them float32."""
    asked = (prompt() * 10)[:150]
    wide, tokens = of_trained_rows(demo, trained_ids, asked)
    narrow, _ = of_trained_rows(load_model(demo_model_path(tmp_path)), trained_ids, asked)
    rows = mx.array([tokens])
    want, plain = wide.hidden(rows), narrow.hidden(rows)
    as_on_metal(narrow, monkeypatch)
    with emulate(mode="plain"):
        got = narrow.hidden(rows)
    error, usual = (mx.square(found - want).mean().item() for found in (got, plain))
    assert 0 < error <= 3 * usual, (error, usual)


def test_a_padded_prompt_is_the_same(
    demo: Model, trained_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows, of which one begins 37 tokens later than the other."""
    model, tokens = of_trained_rows(demo, trained_ids, (prompt() * 20)[:260])
    rows = mx.array([tokens[:150], [0] * 37 + tokens[90:203]])
    want = mx.concatenate(
        [model.next_logits(mx.array([t])) for t in (tokens[:150], tokens[90:203])]
    )
    as_on_metal(model, monkeypatch)
    with emulate(mode="plain"):
        got = model.next_logits(rows, model.make_cache(2, left_padding=[0, 37]))
    assert mx.abs(got - want).max().item() < 2e-5 * mx.abs(want).max().item()


def test_the_whole_vocabulary(demo: Model) -> None:
    found, _ = by_kernels(demo, prompt(), 2)
    assert found == by_mlx(demo, prompt(), 2)
