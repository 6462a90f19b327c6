"""The kernels of prompts: every boundary of theirs, against their definitions in the emulator."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.kernels.agreement import compare, excess, widened
from mlx_gptoss.kernels.inputs import Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.metal.emulator import emulate

random = np.random.default_rng(0)


def ids(tokens: int, count: int, chosen: int = 4) -> mx.array:
    """Choices of experts, (N, K): no two of a token alike."""
    picked = [random.permutation(count)[:chosen] for _ in range(tokens)]
    return mx.array(np.stack(picked).astype(np.uint32))


DISPATCHED: dict[str, Callable[[], mx.array]] = {
    "one token, whose ids MLX passes as constants": lambda: ids(1, 32),
    "two tokens": lambda: ids(2, 32),
    "3 pairs": lambda: ids(1, 32, chosen=3),
    "28 pairs": lambda: ids(7, 32),
    "132 pairs": lambda: ids(33, 32),
    "one below 8 simdgroups": lambda: ids(255, 32, chosen=1),
    "8 simdgroups": lambda: ids(64, 32),
    "one above": lambda: ids(257, 32, chosen=1),
    "129 tokens": lambda: ids(129, 32),
    "all on the last expert": lambda: mx.full((200, 1), 31, dtype=mx.uint32),
    "all on the first": lambda: mx.zeros((67, 4), dtype=mx.uint32),
    "half of the experts idle": lambda: ids(70, 16) * 2,
}


@pytest.mark.parametrize("name", DISPATCHED)
def test_dispatch_of(name: str) -> None:
    experts = DISPATCHED[name]()
    for order in ("forward", "reverse"):
        with emulate(order=order):
            found = compare(KERNELS["expert_dispatch"], {"experts": experts, "count": 32})
        assert max(found) == 0, order


@pytest.mark.parametrize(("tokens", "count"), [(512, 32), (2048, 32), (512, 128), (1999, 128)])
def test_dispatch_of_published_shapes(tokens: int, count: int) -> None:
    with emulate(mode="plain"):
        found = compare(KERNELS["expert_dispatch"], {"experts": ids(tokens, count), "count": count})
    assert max(found) == 0


def test_dispatch_by_hand() -> None:
    experts = mx.array([[3, 1], [0, 3], [3, 2]], mx.uint32)
    with emulate():
        found = KERNELS["expert_dispatch"].launch(experts, count=5)
    assert found.tokens.tolist() == [1, 0, 2, 0, 1, 2]
    assert found.inverse.tolist() == [3, 1, 0, 4, 5, 2]
    assert found.experts.tolist() == [0, 1, 2, 3, 3, 3]
    assert found.offsets.tolist() == [0, 1, 2, 3, 6, 6]


def window_inputs(
    tokens: int,
    offset: int,
    *,
    heads: tuple[int, int] = (9, 3),
    window: int = 96,
    dtype: mx.Dtype = mx.float32,
) -> dict[str, Any]:
    """One row without padding; what was before position 0 is NaN."""

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, dtype=np.float32)).astype(dtype)

    rows = window + tokens
    exists = (mx.arange(rows) >= window - offset)[:, None]
    keys, values = (mx.where(exists, normal(1, heads[1], rows, 64), mx.nan) for _ in range(2))
    return {
        "q": normal(1, heads[0], tokens, 64),
        "keys": keys.astype(dtype),
        "values": values.astype(dtype),
        "sinks": normal(heads[0]),
        "scale": 0.19,
        "offset": offset,
        "start": None,
    }


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("tokens", "offset"),
    [(1, 500), (2, 95), (7, 94), (8, 96), (9, 97), (33, 0), (33, 95), (31, 63), (130, 1)],
)
def test_window_of_chunks(tokens: int, offset: int, order: Any) -> None:
    """Of one token to several blocks of 8; begun before, at and after the end of the window."""
    given = window_inputs(tokens, offset)
    with emulate(order=order):
        found = compare(KERNELS["attention_window_prefill"], given)
    assert max(found) <= 1, found


def test_padding_sees_nothing() -> None:
    """Rows that begin within the chunk and after it; what comes later is not the padding's."""
    given = window_inputs(41, 200)
    for name in ("q", "keys", "values"):
        given[name] = mx.repeat(given[name], 9, axis=0)
    given["start"] = mx.array([0, 104, 199, 200, 201, 230, 240, 241, 400], mx.int32)
    for order in ("forward", "reverse"):
        with emulate(order=order):
            found = compare(KERNELS["attention_window_prefill"], given)
        assert max(found) <= 1, found


@pytest.mark.parametrize("distance", [126, 127, 128, -1])
def test_window_edge(distance: int) -> None:
    """A key 127 positions back is seen, one of 128 is not, nor one of the future."""
    given = window_inputs(33, 300, heads=(8, 1), window=128)
    ones = mx.ones_like(given["values"])
    token = 32 if distance > 0 else 20
    marked = mx.arange(33 + 128) == 128 + token - distance
    given["values"] = mx.where(marked[:, None], ones, 0)
    with emulate():
        y = KERNELS["attention_window_prefill"].launch(**given)
    assert (y[0, token, 0].item() != 0) == (0 <= distance < 128)


def test_window_of_the_published_shape() -> None:
    """Some threadgroups of a chunk of 520, in all KV heads."""
    given = window_inputs(520, 4096, heads=(64, 8), window=128, dtype=mx.bfloat16)
    kernel = KERNELS["attention_window_prefill"]
    blocks, sampled = 520 // 8, 16
    with emulate(mode="plain", threadgroups=sampled):
        got = kernel.launch(**given).reshape(blocks, 8, 64, 64)
    want = kernel.define(**widened(given)).reshape(blocks, 8, 64, 64)
    for group in range(sampled):
        plane, block = divmod(group * blocks * 8 // sampled, blocks)
        heads = slice(8 * plane, 8 * plane + 8)
        assert excess(got[block, :, heads], want[block, :, heads]) <= 1, (plane, block)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(random.standard_normal(shape, dtype=np.float32)).astype(dtype)


@pytest.mark.parametrize("offset", [0, 5, 95, 96, 97, 500])
@pytest.mark.parametrize("tokens", [1, 2, 95, 96, 97, 200])
def test_ring_of(tokens: int, offset: int) -> None:
    """Chunks shorter and longer than the ring, from its first turn and later ones."""
    ring, new = (tuple(normal(2, 3, rows, 64) for _ in range(2)) for rows in (96, tokens))
    with emulate():
        found = compare(KERNELS["extend_ring"], {"ring": ring, "new": new, "offset": offset})
    assert max(found) == 0


@pytest.mark.parametrize("queries", [1, 6, 7])
@pytest.mark.parametrize("angles", [1, 2])
def test_rotation_of_the_last_queries(queries: int, angles: int) -> None:
    """With angles of each row, and with those of one for both."""
    given = KERNELS["qkv_rope"].case(Inputs(replace(Sizes(), tokens=7), dtype=mx.bfloat16))
    q, k, v = given["products"]
    given["products"] = (normal(2, queries, q.shape[-1], dtype=mx.bfloat16), k, v)
    given["angles"] = tuple(angle[:angles] for angle in given["angles"])
    with emulate():
        found = compare(KERNELS["qkv_rope"], given)
    assert max(found) <= 1, found


@pytest.mark.parametrize("hidden", [192, 2880])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 24, 25, 33])
def test_routes_of(tokens: int, hidden: int) -> None:
    """Around the 24 rows of a threadgroup with one simdgroup a block, and the 8 of one with 3.

    Against float64: of 2880 columns MLX's CPU is further off than the kernel.
    """
    kernel, sizes = KERNELS["route_prefill"], replace(Sizes(), tokens=tokens, hidden=hidden)
    given = kernel.case(Inputs(sizes, dtype=mx.bfloat16))
    with emulate():
        y, experts, shares = kernel.launch(**given)
    x, norm, weight, bias = (
        np.array(a.astype(mx.float32), np.float64)
        for a in (given["x"], given["norm"], given["router"].weight, given["router"].bias)
    )
    exact = x / np.sqrt((x * x).mean(-1, keepdims=True) + given["eps"]) * norm
    logits = exact @ weight.T + bias
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :4]
    powers = np.exp(np.take_along_axis(logits - logits.max(-1, keepdims=True), chosen, axis=-1))
    assert experts.tolist() == chosen.tolist()
    assert np.abs(np.array(shares) - powers / powers.sum(-1, keepdims=True)).max() <= 2e-6
    assert excess(y, mx.array(exact.astype(np.float32))) <= 1


def test_ties_and_logits_that_are_not_numbers() -> None:
    """Equal logits go to the lower expert; without numbers, ids stay in range."""
    given = KERNELS["route_prefill"].case(Inputs(replace(Sizes(), tokens=3), dtype=mx.float32))
    router = given["router"]
    given["router"] = replace(router, weight=mx.zeros_like(router.weight))
    for bias, want in ((1.0, [0, 1, 2, 3]), (mx.nan, [19] * 4)):
        given["router"] = replace(given["router"], bias=mx.full((20,), bias))
        with emulate():
            _, experts, _ = KERNELS["route_prefill"].launch(**given)
        assert experts.tolist() == [want] * 3


def test_all_pairs_on_the_last_expert() -> None:
    make = Inputs(replace(Sizes(), tokens=7), dtype=mx.float32)
    for stem in ("swiglu_pairs", "sum_pairs"):
        given = KERNELS[stem].case(make)
        last = mx.full((28,), 19, mx.uint32)
        changes: dict[str, Any] = {"experts": last}
        if stem == "sum_pairs":
            changes = {"choice": (last.reshape(7, 4), given["choice"][1])}
        with emulate():
            found = compare(KERNELS[stem], given | changes)
        assert max(found) <= 1, stem
