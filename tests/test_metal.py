"""What only a Mac can show: every kernel on its GPU, against its definition there.

The same comparisons run everywhere in the emulator (`test_kernels.py`, `test_verify.py`).
"""

from functools import partial

import mlx.core as mx
import pytest

from mlx_gptoss import verify
from mlx_gptoss.checkpoint import open_checkpoint
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B
from mlx_gptoss.kernels.agreement import MOST_EXCESS, agrees
from mlx_gptoss.kernels.inputs import Inputs, Sizes
from mlx_gptoss.kernels.registry import KERNELS
from mlx_gptoss.kernels.selection import disagreement, sizes_of
from mlx_gptoss.kernels.trials import cut_sizes
from mlx_gptoss.library import find_model
from mlx_gptoss.model import load_model
from mlx_gptoss.verify import Outcome

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(not mx.metal.is_available(), reason="this machine has no Metal device"),
]

PUBLISHED = Sizes(
    batch=1, hidden=2880, inter=2880, q_heads=64, kv_heads=8, experts=8, vocab=640, window=128
)


@pytest.mark.parametrize("sizes", [Sizes(), PUBLISHED], ids=["small", "20b"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("stem", sorted(KERNELS))
def test_a_kernel_agrees_with_its_definition(stem, dtype, sizes):
    kernel = KERNELS[stem]
    for dense in ("plain", "q8", "q4") if kernel.dense else ("plain",):
        worst = max(agrees(kernel, sizes, dtype=dtype, dense=dense))
        most = MOST_EXCESS if sizes is PUBLISHED else 1
        assert worst <= most, f"{dense}: {worst:.3g} times the tolerance"


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B], ids=["20b", "120b"])
@pytest.mark.parametrize("stem", sorted(KERNELS))
def test_a_kernel_agrees_where_a_model_would_launch_it(stem, config):
    """As the first-use check does without a model: all experts, some rows of each."""
    forms = ("plain", "q8", "q4") if KERNELS[stem].dense else ("plain",)
    sources = [partial(Inputs, dtype=mx.bfloat16, dense=dense) for dense in forms]
    sizes = cut_sizes(stem, sizes_of(config))
    assert disagreement(KERNELS[stem], sizes, sources=sources) == ""


def test_the_demo_verifies():
    folder = find_model("demo")
    checks = [*verify.verify(folder), verify._kernels(load_model(folder))]
    assert [c.detail for c in checks if c.outcome is Outcome.FAILED] == []


def test_the_gpu_gives_the_answer_of_the_cpu():
    """The stored answer was recorded on a CPU; a Mac's GPU must give it too."""
    folder = find_model("demo")
    check = verify._answer(open_checkpoint(folder), load_model(folder))
    assert check.outcome is Outcome.PASSED, check.detail
