"""A decode step of several turns, each with a cache of its own: kernels, chain and bytes.

Kernels are counted in the graph of the compiled step, fused as MLX fuses it for Metal. Models of
two and of four layers are traced, at small widths, which the graph does not depend on; the rest
follows by addition.

Bytes of a matrix count as often as the form that the step takes goes through it for its rows, and
of an expert as often as rows that choose at random, independently of each other, make it.
"""

from collections.abc import Callable
from functools import partial
from math import ceil, comb
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_gptoss import matrix
from mlx_gptoss.checkpoint import expected_tensors
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.decode import Decoder
from mlx_gptoss.dispatches import Counted, count_lazy, step_arguments
from mlx_gptoss.kernels.agreement import flattened
from mlx_gptoss.kernels.batches import experts_form, takes_mlx
from mlx_gptoss.kernels.grouped import BLOCK
from mlx_gptoss.kernels.matrix import row_blocks
from mlx_gptoss.kernels.projections import ROUTE_ROWS
from mlx_gptoss.kernels.selection import all_kernels
from mlx_gptoss.model import Model
from mlx_gptoss.plan import dense_quantization

BATCHES = (1, 2, 4, 8, 16, 32)
OPERATIONS = {
    "q_proj": "norm_qkv_rope",
    "k_proj": "norm_qkv_rope",
    "v_proj": "norm_qkv_rope",
    "o_proj": "out_residual",
    "lm_head": "unembed",
    "router": "route",
}


def count_batch(two: Model, four: Model, *, layers: int, rows: int) -> Counted:
    """Count a step of so many rows.

    Args:
        two: a model of two layers.
        four: the same with four.
        layers: of the model that is meant.
        rows: turns in step.
    """
    short, long = (_count_compiled(model, rows) for model in (two, four))
    pairs = (layers - 2) // 2
    return Counted(
        kernels=short.kernels + pairs * (long.kernels - short.kernels),
        depth=short.depth + pairs * (long.depth - short.depth),
        inputs=short.inputs + pairs * (long.inputs - short.inputs),
    )


def _count_compiled(model: Model, rows: int) -> Counted:
    decoder = Decoder(model, kernels=all_kernels(), allowed=[1] * model.config.vocab_size)
    arguments = step_arguments(decoder, rows=rows, capacity=256)
    mx.eval(arguments)
    return count_as_metal(partial(decoder.step, filtered=False), *arguments)


def count_as_metal(call: Callable[..., Any], *arguments: Any) -> Counted:
    """Compile a function, and count its graph of evaluated arguments as Metal runs it."""

    def rms_norm(x: mx.array, weight: mx.array, _: float) -> mx.array:
        return mx.cumsum(mx.depends([x], [weight])[0], axis=-1)  # one kernel, which nothing fuses

    def kernel(**_: Any) -> Callable[..., list[mx.array]]:
        return launch

    def launch(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        launched = mx.cumsum(mx.depends([mx.array([0.0])], inputs)[0])
        shapes = zip(output_shapes, output_dtypes, strict=True)
        views = [mx.broadcast_to(mx.array(0, dtype), shape) for shape, dtype in shapes]
        return mx.depends(views, [launched])

    with (
        patch.object(mx.fast, "rms_norm", rms_norm),
        patch.object(mx.fast, "metal_kernel", kernel),
        patch.object(matrix, "on_cpu", lambda: False),
    ):
        made: Any = mx.compile(call)(*arguments)
    return count_lazy(*flattened(made))


def batch_weight_bytes(config: ModelConfig, dense: str, rows: int) -> float:
    """Bytes of weights that a step of so many rows reads."""
    packing = "plain" if dense == "bf16" else dense
    total = 0.0
    for name, spec in expected_tensors(config, dense_quantization(config, dense)).items():
        operation = next((o for part, o in OPERATIONS.items() if part in name), None)
        if ".experts." in name:
            total += spec.nbytes / config.num_local_experts * experts_read(config, rows)
        elif "embed_tokens" in name:
            total += spec.nbytes / config.vocab_size * rows
        elif operation is None:
            total += spec.nbytes
        else:
            kind = config.num_local_experts if operation == "route" else packing
            total += spec.nbytes * passes(operation, kind, rows)
    return total


def passes(operation: str, packing_or_experts: str | int, rows: int) -> int:
    """How often a step reads a dense matrix."""
    if takes_mlx(operation, packing_or_experts, rows):
        return 1
    return ceil(rows / ROUTE_ROWS) if operation == "route" else row_blocks(rows, 32).groups


def experts_read(config: ModelConfig, rows: int) -> float:
    """Experts of a layer that a step reads, one that is read twice counted twice."""
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    form, share = experts_form(experts, rows), chosen / experts
    if form == "rows":
        return rows * chosen
    if form == "mlx":
        return experts * (1 - (1 - share) ** rows)
    return experts * sum(
        ceil(n / BLOCK) * comb(rows, n) * share**n * (1 - share) ** (rows - n)
        for n in range(rows + 1)
    )
