"""The kernels of prompts: every boundary of theirs, against their definitions in the emulator."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.kernels.agreement import compare, excess, widened
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
