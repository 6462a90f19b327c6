"""The decode loop, on a stand-in whose next token depends on every token fed, in order."""

import math
import re

import mlx.core as mx
import numpy as np
import pytest
from hash_model import (
    CONTEXT,
    GREEDY,
    PROMPT,
    HashCache,
    HashModel,
    V,
    assert_cache_holds,
    engine,
    greedy,
)
from weights import tiny_model

from mlx_gptoss.cache import FullCache
from mlx_gptoss.engine import Engine, Finish
from mlx_gptoss.errors import ContextLengthError
from mlx_gptoss.sampling import SamplingParams


@pytest.mark.parametrize("chunk", [1, 3, 9, 10, 11, 512])
def test_tokens_are_those_of_the_definition_however_the_prompt_is_cut(chunk: int) -> None:
    model = HashModel()
    seen: list[tuple[int, int]] = []
    generation = engine(model, prefill_chunk=chunk).generate(
        PROMPT, sampling=GREEDY, max_tokens=40, on_prefill=lambda *at: seen.append(at)
    )
    assert list(generation) == greedy(PROMPT, 40)
    assert generation.finish is Finish.LENGTH
    prefills = math.ceil(len(PROMPT) / chunk)
    assert model.fed == [min(chunk, len(PROMPT) - i * chunk) for i in range(prefills)] + [1] * 39
    assert seen == [(min((i + 1) * chunk, 10), 10) for i in range(prefills)]


def test_the_device_is_one_step_ahead_and_never_two() -> None:
    """When the host gets token n, the step that computes token n + 1 has been launched."""
    model = HashModel()
    generation = engine(model).generate(PROMPT, sampling=GREEDY, max_tokens=5)
    launched = []
    for _ in generation:
        launched.append(len(model.fed))
    assert launched == [2, 3, 4, 5, 5]


def test_the_step_that_merges_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging with a step in flight or a snapshot held would copy every long store."""
    monkeypatch.setattr(HashCache, "merge_every", 4)
    model = HashModel()
    launched = []
    generation = engine(model).generate(PROMPT, sampling=GREEDY, max_tokens=9)
    tokens = [(token, launched.append(len(model.fed)))[0] for token in generation]
    assert tokens == greedy(PROMPT, 9)
    assert launched == [2, 3, 3, 5, 6, 7, 7, 9, 9], "the cache holds 12 and 16 at the third and 7th"
    for count in range(1, 9):
        with engine().generate(PROMPT, sampling=GREEDY) as cancelled:
            first = [next(cancelled) for _ in range(count)]
        assert_cache_holds(cancelled.cache, PROMPT + first[:-1])


@pytest.mark.parametrize("chunk", [4, 512])
def test_a_stop_token_is_the_last_and_the_step_in_flight_is_dropped(chunk: int) -> None:
    expected = greedy(PROMPT, 30)
    stop = next(token for i, token in enumerate(expected) if i > 5 and token not in expected[:i])
    end = expected.index(stop) + 1
    generation = engine(prefill_chunk=chunk).generate(PROMPT, sampling=GREEDY, stop=[stop, 1000])
    assert list(generation) == expected[:end]
    assert generation.finish is Finish.STOP
    assert_cache_holds(generation.cache, PROMPT + expected[: end - 1])


def test_a_first_token_that_stops_leaves_the_prompt_in_the_cache() -> None:
    [first] = greedy(PROMPT, 1)
    generation = engine().generate(PROMPT, sampling=GREEDY, stop=[first])
    assert list(generation) == [first]
    assert_cache_holds(generation.cache, PROMPT)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens_launches_no_step_in_vain(count: int) -> None:
    model = HashModel()
    generation = engine(model).generate(PROMPT, sampling=GREEDY, max_tokens=count)
    assert list(generation) == greedy(PROMPT, count)
    assert generation.finish is Finish.LENGTH
    assert model.fed == [10] + [1] * (count - 1)
    assert_cache_holds(generation.cache, PROMPT + greedy(PROMPT, count - 1))


def test_closing_cancels_and_the_cache_can_go_on() -> None:
    model = HashModel()
    e = engine(model)
    with e.generate(PROMPT, sampling=GREEDY) as generation:
        first = [next(generation) for _ in range(4)]
    assert first == greedy(PROMPT, 4)
    assert generation.finish is Finish.CANCELLED
    assert list(generation) == []
    assert_cache_holds(generation.cache, PROMPT + first[:3])
    again = e.generate(PROMPT + first, sampling=GREEDY, max_tokens=6, cache=generation.cache)
    assert list(again) == greedy(PROMPT, 10)[4:]
    assert again.stats.cached_tokens == 13
    assert again.stats.prompt_tokens == 14


def test_closing_before_the_first_token_feeds_nothing() -> None:
    model = HashModel()
    generation = engine(model).generate(PROMPT)
    generation.close()
    assert model.fed == [] and generation.finish is Finish.CANCELLED
    assert list(generation) == []


def test_a_prompt_can_be_given_up_between_chunks() -> None:
    model = HashModel()

    def give_up(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    generation = engine(model, prefill_chunk=2).generate(PROMPT, on_prefill=give_up)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert model.fed == [2, 2]


def test_the_end_of_the_context_ends_the_generation() -> None:
    prompt = [3] * (CONTEXT - 2)
    generation = engine().generate(prompt, sampling=GREEDY, max_tokens=50)
    assert len(list(generation)) == 2
    assert generation.finish is Finish.LENGTH


@pytest.mark.parametrize("size", [CONTEXT, CONTEXT + 5])
def test_a_prompt_without_room_for_an_answer(size: int) -> None:
    with pytest.raises(
        ContextLengthError, match=f"expected fewer than {CONTEXT} tokens.* got {size}; shorten it"
    ):
        engine().generate([3] * size)


def test_a_seed_gives_the_same_tokens_again_and_another_gives_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        generation = engine().generate(PROMPT, sampling=SamplingParams(seed=seed), max_tokens=60)
        drawn = list(generation)
        assert generation.sampling.seed is not None
        return drawn

    assert tokens(11) == tokens(11) != tokens(12)
    assert tokens(None) != tokens(None), "without a seed each generation draws its own"


def test_noise_goes_by_position_so_a_cached_prefix_changes_nothing() -> None:
    """The same request gives the same tokens whether its prompt was cached or not."""
    sampling = SamplingParams(seed=5)
    whole = list(engine().generate(PROMPT, sampling=sampling, max_tokens=30))
    cache = HashCache()
    HashModel().hidden(mx.array([PROMPT[:6]]), cache)
    rest = engine().generate(PROMPT, sampling=sampling, max_tokens=30, cache=cache)  # type: ignore[arg-type]
    assert list(rest) == whole
    later = PROMPT + whole[:12]
    assert list(engine().generate(later, sampling=sampling, max_tokens=18)) == whole[12:]


def test_noise_changes_from_position_to_position() -> None:
    model = HashModel()
    model.next_logits = lambda tokens, cache: (model.hidden(tokens, cache), mx.zeros((1, V)))[1]  # type: ignore[method-assign]
    tokens = list(engine(model).generate(PROMPT, sampling=SamplingParams(seed=1), max_tokens=80))
    assert len(set(tokens)) > 30, "equal logits at every position must not give equal tokens"


def test_ids_that_are_not_allowed_are_never_emitted() -> None:
    allowed = np.ones(V, dtype=np.bool_)
    allowed[::2] = False
    for sampling in (GREEDY, SamplingParams(seed=3)):
        tokens = engine(allowed=allowed).generate(PROMPT, sampling=sampling, max_tokens=100)
        assert all(token % 2 for token in tokens)


def test_statistics_count_what_happened() -> None:
    generation = engine().generate(PROMPT, sampling=GREEDY, max_tokens=3)
    before = generation.stats
    assert (before.ttft_s, before.prefill_tok_per_s, before.decode_tok_per_s) == (None,) * 3
    next(generation)
    assert generation.stats.ttft_s is not None and generation.stats.decode_tok_per_s is None
    list(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (10, 0, 3)
    assert stats.ttft_s is not None and stats.prefill_tok_per_s is not None
    assert stats.ttft_s * stats.prefill_tok_per_s == pytest.approx(10)
    assert stats.decode_tok_per_s is not None and stats.decode_tok_per_s > 0
    assert stats.peak_memory_bytes > 0


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, f"prompt: expected token ids from 0 to {V - 1}, got none"),
        ([3, V], {}, f"prompt: expected token ids from 0 to {V - 1}, got {V}"),
        ([-1], {}, "got -1"),
        ([3], {"max_tokens": 0}, "max_tokens: expected a whole number >= 1 or None, got 0"),
    ],
)
def test_a_request_that_makes_no_sense(prompt: list[int], options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        engine().generate(prompt, **options)


def test_a_cache_that_holds_the_whole_prompt_is_refused() -> None:
    cache = HashCache()
    HashModel().hidden(mx.array([PROMPT]), cache)
    with pytest.raises(
        ValueError, match="cache: expected to hold less than the prompt's 10 tokens"
    ):
        engine().generate(PROMPT, cache=cache)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allowed": np.zeros(V, dtype=np.bool_)}, r"expected 53 flags.* got 0 true of shape"),
        ({"allowed": np.ones(V + 1, dtype=np.bool_)}, r"got 54 true of shape \(54,\)"),
        ({"prefill_chunk": 0}, "prefill_chunk: expected a whole number >= 1, got 0"),
    ],
)
def test_an_engine_that_makes_no_sense(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        engine(**options)


def test_a_real_model_is_decoded_past_its_window_as_by_one_forward_pass() -> None:
    model = tiny_model()
    prompt = list(range(5, 30))
    tokens = list(Engine(model).generate(prompt, sampling=GREEDY, max_tokens=150))
    logits = model(mx.array([prompt + tokens]))[0, len(prompt) - 1 : -1]
    assert mx.argmax(logits, axis=-1).tolist() == tokens


@pytest.mark.parametrize("taken", [20, 140])
def test_a_real_model_goes_on_from_a_cancelled_turn(taken: int) -> None:
    """The step in flight has overwritten a slot of the ring by then: it must come back."""
    model = tiny_model()
    prompt = list(range(5, 30))
    whole = list(Engine(model).generate(prompt, sampling=GREEDY, max_tokens=taken + 20))
    with Engine(model).generate(prompt, sampling=GREEDY) as generation:
        first = [next(generation) for _ in range(taken)]
    rest = Engine(model).generate(
        prompt + first, sampling=GREEDY, max_tokens=20, cache=generation.cache
    )
    assert first + list(rest) == whole
    assert rest.stats.cached_tokens == len(prompt) + taken - 1


@pytest.mark.parametrize("hold", [False, True])
def test_a_long_store_is_merged_in_place_unless_held(hold: bool) -> None:
    """Why the engine lets go of its snapshot first: at full context the copy would be gigabytes."""
    cache = FullCache((1, 2, 64), mx.float32)
    new = mx.ones((1, 2, 1, 64))
    cache.extend(*[mx.zeros((1, 2, 3900, 64))] * 2)
    while not cache.merges_next:
        cache.append(new, new)
        mx.eval(cache.arrays)
    long_store = sum(array.nbytes for array in cache.arrays[:2])
    snapshot = cache.snapshot() if hold else None
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache.append(new, new)
    mx.eval(cache.arrays)
    grown = mx.get_peak_memory() - before
    assert (grown > 0.9 * long_store) == hold, f"{grown} bytes more, the store has {long_store}"
    del snapshot


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_chunks_end_at_breaks_and_can_be_fed_one_by_one(chunk: int) -> None:
    model, offsets = HashModel(), []
    generation = engine(model, prefill_chunk=chunk).generate(
        PROMPT,
        sampling=GREEDY,
        max_tokens=3,
        breaks=[4, 9],
        on_prefill=lambda *_: offsets.append(generation.cache.offset),
    )
    calls = 1
    while generation.feed():
        assert len(offsets) == calls and sum(model.fed) == offsets[-1] < len(PROMPT)
        calls += 1
    assert len(offsets) == calls and offsets[-1] == len(PROMPT) and {4, 9} <= set(offsets)
    assert not generation.feed() and sum(model.fed) == len(PROMPT), "nothing is fed twice"
    assert list(generation) == greedy(PROMPT, 3)
    assert max(model.fed) <= chunk


def test_generations_take_turns_token_by_token() -> None:
    """Each gives the tokens it gives alone, though one is dropped in the middle."""
    shared = engine()
    prompts = [PROMPT, PROMPT[:3], [5, 5, 6]]
    running = [shared.generate(p, sampling=GREEDY, max_tokens=9) for p in prompts]
    taken: list[list[int]] = [[], [], []]
    for step in range(9):
        for place, generation in enumerate(running):
            if step == 4 and place == 1:
                generation.close()
            taken[place] += [token for token in [next(generation, None)] if token is not None]
    assert taken == [greedy(PROMPT, 9), greedy(PROMPT[:3], 4), greedy([5, 5, 6], 9)]


def test_slow_chunks_become_smaller(monkeypatch) -> None:
    """512 tokens at most, 128 at first, 32 where half a second is not enough for more."""
    clock = iter(range(10**6))
    monkeypatch.setattr("mlx_gptoss.engine.time.perf_counter", lambda: float(next(clock)))
    model, seen = HashModel(), []
    prompt = [i % V for i in range(300)]
    generation = engine(model).generate(
        prompt, sampling=GREEDY, max_tokens=1, on_prefill=lambda *at: seen.append(at)
    )
    next(generation)
    assert model.fed[:4] == [128, 64, 32, 32]  # each took a second
    assert [done for done, _ in seen] == [128, 192, 224, 256, 288, 300]
