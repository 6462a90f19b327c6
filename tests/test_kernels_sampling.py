"""sample_filtered keeps the tokens that sampling.sample keeps, at every edge of a filter.

At a high temperature every kept token is as likely as any other, so rows that differ in their noise
alone show which are kept.
"""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.kernels.inputs import Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.metal.emulator import emulate
from mlx_gptoss.sampling import SamplingParams, SamplingRows, packed, sample, unpacked

KERNEL = KERNELS["sample_filtered"]
ROWS = 96


def given(vocab: int, rows: int, **filters: float) -> dict[str, Any]:
    """The case's first row, `rows` times at different positions, hot."""
    case = KERNEL.case(Inputs(replace(Sizes(), batch=1, vocab=vocab), dtype=mx.float32, seed=3))
    values = [1e4, filters.get("top_k", 0), filters.get("top_p", 1), filters.get("min_p", 0)]
    control = mx.repeat(case["control"], rows, axis=0)
    control[:, 0] = mx.arange(rows)
    return {
        "best": mx.repeat(case["best"], rows, axis=0),
        "logits": mx.repeat(case["logits"], rows, axis=0),
        "allowed": mx.repeat(case["allowed"], rows, axis=0),
        "control": control,
        "sampling": mx.array([[*values, 0, 0, 0, 0]] * rows, dtype=mx.float32),
    }


def kept(arguments: dict[str, Any]) -> set[int]:
    """The tokens a row keeps, by numpy in float64."""
    logits = np.array(arguments["logits"][0], np.float64)
    allowed = unpacked(arguments["allowed"], logits.size)[0].tolist()
    _, top_k, top_p, min_p = arguments["sampling"][0, :4].tolist()
    order = [v for v in np.argsort(-logits, kind="stable") if allowed[v]]
    order = order[: int(top_k) or None]
    p = np.exp(logits[order] - logits[order[0]])
    before = (np.cumsum(p) - p) / p.sum()
    keep = (before < top_p) & (p >= min_p * (1 - 1e-7))
    return {int(v) for v, stays in zip(order, keep, strict=True) if stays}


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1}, {"top_k": 2}, {"top_k": 17}, {"top_k": 562}, {"top_k": 563}, {"top_k": 564},
        {"top_k": 5000}, {"top_p": 1e-6}, {"top_p": 0.3}, {"top_p": 0.6}, {"top_p": 0.999},
        {"min_p": 0.05}, {"min_p": 0.9}, {"top_k": 20, "top_p": 0.7},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.1}, {},
    ],
    ids=str,
)  # fmt: skip
def test_keeps_what_the_filters_leave(filters: dict[str, float]) -> None:
    """Many logits are equal: which of them stay is decided by their ids."""
    arguments = given(704, ROWS, **filters)
    with emulate(mode="plain"):
        tokens = KERNEL.launch(**arguments)[0].tolist()
    assert tokens == KERNEL.define(**arguments)[0].tolist()
    found, expected = set(tokens), kept(arguments)
    assert found <= expected
    if len(expected) < 12:
        assert found == expected
    else:
        assert len(found) > min(len(expected), ROWS) / 2


def test_the_whole_vocabulary() -> None:
    """201,088 ids: tokens beyond the first tile of everything, and the log-probability."""
    arguments = given(201088, 2, top_k=3000, top_p=0.9)
    with emulate(mode="plain"):
        token, logprob, _ = KERNEL.launch(**arguments)
    want = KERNEL.define(**arguments)
    assert token.tolist() == want[0].tolist()
    assert mx.abs(logprob - want[1]).max().item() < 1e-4


def test_all_logits_equal() -> None:
    """One distance, decided by ids alone; and nothing but one token allowed."""
    arguments = given(704, 40, top_k=3)
    zeros = mx.zeros_like(arguments["logits"])
    flat = mx.stack([mx.zeros((40, 11)), mx.zeros((40, 11)), mx.zeros((40, 11)),
                     mx.full((40, 11), 563 / 11)], axis=-1)  # fmt: skip
    with emulate(mode="plain"):
        token, logprob, _ = KERNEL.launch(**arguments | {"logits": zeros, "best": flat})
        assert set(token.tolist()) == {1, 2, 3}
        assert abs(logprob[0].item() + math.log(563)) < 1e-5
        only = np.arange(704) == np.arange(77, 117)[:, None]
        token, _, _ = KERNEL.launch(**arguments | {"allowed": mx.array(packed(only))})
    assert token.tolist() == list(range(77, 117)), "each row has a mask of its own"


def test_a_row_without_filters_is_sample_token_s() -> None:
    """So a row draws the same token whether a neighbour has filters or none has."""
    sizes = replace(Sizes(), batch=33)
    arguments = KERNELS["unembed"].case(Inputs(sizes, dtype=mx.float32))
    columns = mx.arange(8)
    sampling = mx.where(columns == 0, arguments["temperature"], columns == 2)
    control, allowed = arguments["control"], arguments["allowed"]
    with emulate(mode="plain"):
        logits, best = KERNELS["unembed"].launch(**arguments)
        alone = KERNELS["sample_token"].launch(best, logits, control=control)
        beside = KERNEL.launch(best, logits, allowed=allowed, control=control, sampling=sampling)
    assert alone[0].tolist() == beside[0].tolist()
    assert mx.abs(alone[1] - beside[1]).max().item() < 1e-5
    assert alone[2].tolist() == beside[2].tolist()


def test_definition_is_sampling() -> None:
    """The definition reads the arrays as `SamplingRows.pack` writes them."""
    params = [
        SamplingParams(temperature=0.7, top_k=9, seed=2**40 + 5),
        SamplingParams(temperature=0, top_p=0.2, seed=6),
        SamplingParams(temperature=1.2, top_p=0.8, min_p=0.01, seed=7),
    ]
    arguments = KERNEL.case(Inputs(replace(Sizes(), batch=3), dtype=mx.float32))
    control = mx.array([[40 + i, 0, 0, p.seed & 0xFFFFFFFF, p.seed >> 32, 0, 0, 0]
                        for i, p in enumerate(params) if p.seed is not None])  # fmt: skip
    sampling = [[p.temperature, p.top_k or 0, p.top_p, p.min_p or 0, 0, 0, 0, 0] for p in params]
    arguments |= {"control": control.astype(mx.int32), "sampling": mx.array(sampling)}
    want = sample(
        arguments["logits"],
        mx.array([41, 42, 43]),
        rows=SamplingRows.pack(params),
        allowed=unpacked(arguments["allowed"], 704),
    )
    assert KERNEL.define(**arguments)[0].tolist() == want.tolist()
