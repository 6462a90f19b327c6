"""The kernels of prompts: every boundary of theirs, against their definitions in the emulator."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.kernels.agreement import compare
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
    assert found.order.tolist() == [2, 1, 5, 0, 3, 4]
    assert found.inverse.tolist() == [3, 1, 0, 4, 5, 2]
    assert found.experts.tolist() == [0, 1, 2, 3, 3, 3]
    assert found.offsets.tolist() == [0, 1, 2, 3, 6, 6]
