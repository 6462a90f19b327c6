"""Sampling: what is drawn has the right distribution, and depends on nothing but its own row."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss import sampling
from mlx_gptoss.sampling import SamplingParams, SamplingRows, gumbel, sample

V = 37
LOGITS = np.random.default_rng(5).normal(scale=2.0, size=V).astype(np.float32)
ALL = mx.ones((V,), dtype=mx.bool_)
DRAWS = 20_000


def draw(
    params: SamplingParams, logits: np.ndarray = LOGITS, allowed: mx.array = ALL
) -> np.ndarray:
    """DRAWS tokens of one sequence with constant logits: positions 0..DRAWS-1."""
    packed = SamplingRows.pack([params])
    rows = replace(
        packed,
        **{
            name: mx.repeat(getattr(packed, name), DRAWS, axis=0)
            for name in ("temperature", "top_p", "top_k", "min_p", "key")
        },
    )
    batch = mx.broadcast_to(mx.array(logits), (DRAWS, len(logits)))
    return np.array(sample(batch, mx.arange(DRAWS), rows=rows, allowed=allowed))


def expected(params: SamplingParams, logits: np.ndarray = LOGITS) -> np.ndarray:
    """The distribution by its definition, in float64, one filter after the other."""
    z = logits.astype(np.float64)
    order = np.argsort(-z, kind="stable")
    if params.top_k is not None:
        order = order[: params.top_k]
    p = np.exp(z[order] - z.max())
    p /= p.sum()
    if params.top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(p), params.top_p)) + 1]
    if params.min_p is not None:
        order = order[np.exp(z[order] - z.max()) >= params.min_p]
    weights = np.zeros(len(z))
    weights[order] = np.exp((z[order] - z.max()) / params.temperature)
    return weights / weights.sum()


def assert_distribution(tokens: np.ndarray, p: np.ndarray) -> None:
    """Chi-square of the counts, five standard deviations wide; nothing outside the support."""
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0, np.flatnonzero(counts * (p == 0))
    big = p * len(tokens) >= 5
    observed = np.append(counts[big], counts[~big].sum())
    mean = np.append(p[big], p[~big].sum()) * len(tokens)
    chi2 = ((observed - mean)[mean > 0] ** 2 / mean[mean > 0]).sum()
    df = max(int((mean > 0).sum()) - 1, 1)
    assert chi2 < df + 5 * math.sqrt(2 * df), f"chi-square {chi2:.1f} for {df} degrees of freedom"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.3, seed=2),
        SamplingParams(temperature=2.5, seed=3),
        SamplingParams(top_k=5, seed=4),
        SamplingParams(top_p=0.7, seed=5),
        SamplingParams(min_p=0.1, seed=6),
        SamplingParams(temperature=1.7, top_k=9, top_p=0.8, min_p=0.05, seed=7),
        SamplingParams(temperature=3.0, top_p=0.6, min_p=0.2, seed=2**64 - 1),
        SamplingParams(seed=0),
    ],
    ids=str,
)
def test_draws_follow_the_definition(params: SamplingParams) -> None:
    assert_distribution(draw(params), expected(params))


def test_filters_come_before_the_temperature() -> None:
    """top-p of a hot draw keeps what it keeps at temperature 1, as in llama.cpp and mlx-lm."""
    support = [
        set(draw(SamplingParams(temperature=t, top_p=0.6, seed=8)).tolist()) for t in (1.0, 4.0)
    ]
    assert support[0] == support[1] == set(np.flatnonzero(expected(SamplingParams(top_p=0.6))))


def test_top_p_renormalises_what_top_k_left() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 4/7, 3/7: top-p 0.55 then keeps one, not two."""
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))
    both = draw(SamplingParams(top_k=2, top_p=0.55, seed=1), logits, mx.ones((4,), dtype=mx.bool_))
    assert set(both.tolist()) == {1}
    alone = draw(SamplingParams(top_p=0.55, seed=1), logits, mx.ones((4,), dtype=mx.bool_))
    assert set(alone.tolist()) == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_bfloat16_logits_are_as_good_as_the_same_in_float32(temperature: float) -> None:
    narrow = mx.array(LOGITS).astype(mx.bfloat16)
    rows = SamplingRows.pack([SamplingParams(temperature=temperature, top_p=0.9, seed=5)] * 50)
    positions = mx.arange(50)
    tokens = [
        sample(mx.broadcast_to(logits, (50, V)), positions, rows=rows, allowed=ALL).tolist()
        for logits in (narrow, narrow.astype(mx.float32))
    ]
    assert tokens[0] == tokens[1]


def test_temperature_zero_takes_the_first_best() -> None:
    logits = np.zeros(V, dtype=np.float32)
    logits[[4, 9]] = 3.0
    assert set(draw(SamplingParams(temperature=0, seed=0), logits=logits)) == {4}


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=0.999)]
)
def test_the_tightest_filter_is_greedy(params: SamplingParams) -> None:
    assert set(draw(replace(params, seed=3)).tolist()) == {int(LOGITS.argmax())}


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    flat = np.zeros(V, dtype=np.float32)
    assert set(draw(SamplingParams(top_k=4, seed=1), logits=flat).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_k=63, top_p=0.9),
        SamplingParams(top_k=64, min_p=0.01),
        SamplingParams(top_k=65, temperature=1.7),
        SamplingParams(top_k=150, top_p=0.5),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "tied", "mostly forbidden"])
def test_a_partition_chooses_as_a_sort(
    kind: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best are picked out before they are sorted; by definition, all are sorted."""
    size, rng = 203, np.random.default_rng(11)
    logits = rng.normal(scale=2, size=(200, size)).astype(np.float32)
    if kind == "tied":
        logits = np.round(logits)
    allowed = mx.array(rng.random(size) < (0.2 if kind == "mostly forbidden" else 1))
    pairs = [(replace(params, seed=n), SamplingParams(top_k=2, seed=n)) for n in range(100)]
    rows = SamplingRows.pack([row for pair in pairs for row in pair])

    def tokens() -> list[int]:
        return sample(mx.array(logits), mx.arange(200), rows=rows, allowed=allowed).tolist()

    picked = tokens()
    monkeypatch.setattr(sampling, "_best", lambda logits, count: mx.argsort(-logits, axis=-1))
    assert picked == tokens()


def test_a_temperature_too_small_for_float32_is_greedy_and_not_nan() -> None:
    params = SamplingParams(temperature=1e-300, seed=3)
    assert set(draw(params).tolist()) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("params", [SamplingParams(seed=1), SamplingParams(top_p=0.5, seed=1)])
def test_one_id_left_is_always_chosen(params: SamplingParams) -> None:
    logits = np.full(V, -np.inf, dtype=np.float32)
    logits[11] = -4e4
    assert set(draw(params, logits=logits).tolist()) == {11}
    only = mx.arange(V) == 20
    assert set(draw(params, allowed=only).tolist()) == {20}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [None, 30])
def test_ids_that_are_not_allowed_never_appear(temperature: float, top_k: int | None) -> None:
    best = int(LOGITS.argmax())
    allowed = mx.arange(V) != best
    params = SamplingParams(temperature=temperature, top_k=top_k, seed=9)
    assert best not in draw(params, allowed=allowed)


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=3),
    settings_of_rows=st.lists(
        st.sampled_from(
            [
                SamplingParams(temperature=0),
                SamplingParams(),
                SamplingParams(top_k=3),
                SamplingParams(top_p=0.8, temperature=1.4),
                SamplingParams(min_p=0.02),
            ]
        ),
        min_size=3,
        max_size=3,
    ),
    position=st.integers(0, 131_071),
)
@settings(max_examples=40, deadline=None)
def test_a_row_gives_the_same_token_alone_and_in_a_batch(
    seeds: list[int], settings_of_rows: list[SamplingParams], position: int
) -> None:
    """Bf16 logits tie often, so the logits here are coarse on purpose."""
    params = [replace(p, seed=s) for p, s in zip(settings_of_rows, seeds, strict=True)]
    logits = mx.round(mx.random.normal((3, V), key=mx.random.key(position)) * 2)
    positions = mx.array([position, position + 7, 3])
    together = sample(logits, positions, rows=SamplingRows.pack(params), allowed=ALL)
    for i, p in enumerate(params):
        one = slice(i, i + 1)
        alone = sample(logits[one], positions[one], rows=SamplingRows.pack([p]), allowed=ALL)
        assert alone.item() == together[i].item(), (p, i)


def test_noise_is_gumbel_and_finite() -> None:
    ids = mx.arange(200_000, dtype=mx.uint32)[None]
    noise = np.array(gumbel(mx.array([[3, 0]], dtype=mx.uint32), mx.array([17]), ids=ids))[0]
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.57722) < 0.015  # Euler's constant; the standard error is 0.003
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    assert noise.max() > 9, "a draw from 200,000 ids needs the upper tail"


def test_noise_of_neighbouring_counters_is_unrelated() -> None:
    """Correlation across seeds, positions and ids that differ by one bit is noise itself."""
    ids = mx.arange(60_000, dtype=mx.uint32)[None]

    def noise(low: int, high: int, position: int) -> np.ndarray:
        key = mx.array([[low, high]], dtype=mx.uint32)
        return np.array(gumbel(key, mx.array([position]), ids=ids))[0]

    base = noise(0, 0, 0)
    others = [noise(1, 0, 0), noise(0, 1, 0), noise(0, 0, 1), noise(1, 0, 1), noise(1, 1, 0)]
    assert abs(np.corrcoef(base[1:], base[:-1])[0, 1]) < 0.02
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.02
        shared = np.isin(base[:1000], other[:1000]).sum()
        assert shared <= 5, "the same noise at other ids: the counters only permute it"


@pytest.mark.parametrize(
    ("field", "value", "expects"),
    [
        ("temperature", -0.1, "a number >= 0"),
        ("temperature", math.nan, "a number >= 0"),
        ("temperature", math.inf, "a number >= 0"),
        ("top_p", 0.0, r"a number in \(0, 1\]"),
        ("top_p", 1.01, r"a number in \(0, 1\]"),
        ("top_k", 0, "a whole number >= 1 or None"),
        ("min_p", 1.0, r"a number in \[0, 1\) or None"),
        ("min_p", -0.5, r"a number in \[0, 1\) or None"),
        ("seed", -1, r"a whole number in \[0, 2\*\*64\)"),
        ("seed", 2**64, r"a whole number in \[0, 2\*\*64\)"),
    ],
)
def test_a_parameter_out_of_range_says_so(field: str, value: float, expects: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected {expects}.*, got "):
        SamplingParams(**{field: value})


def test_a_missing_seed_is_drawn_once_and_a_given_one_kept() -> None:
    drawn = SamplingParams().seeded()
    assert drawn.seed is not None and drawn.seeded() is drawn
    assert SamplingParams(seed=7).seeded().seed == 7
    with pytest.raises(ValueError, match="seed: every row needs one"):
        SamplingRows.pack([SamplingParams()])
