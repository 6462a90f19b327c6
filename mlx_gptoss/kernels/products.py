"""Dense operations of a batch by MLX's products, all rows in one: what `batches.MLX_FROM` chooses.

Each has the signature of the kernel whose place it takes, and `kernels` for what runs beside the
product. A GEMM adds in an order that depends on the number of rows, and its result is rounded to
the type of x: a row's last bits are not those that it has alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_gptoss import reference
from mlx_gptoss.kernels import definitions
from mlx_gptoss.kernels.projections import Segment
from mlx_gptoss.kernels.selection import KernelSet
from mlx_gptoss.matrix import Matrix, unbiased_linear
from mlx_gptoss.rope import RopeTable


def norm_qkv_rope(
    x: mx.array,
    norm: mx.array,
    projections: Sequence[Matrix],
    rope: tuple[mx.array, mx.array],
    *,
    control: mx.array,
    append: Segment,
    eps: float,
    kernels: KernelSet,
) -> tuple[mx.array, Segment]:
    """See `kernels.norm_qkv_rope`; rows above the slot keep what they were."""
    y = kernels.rms_norm(x, norm, eps=eps)
    parts = [unbiased_linear(y, matrix)[:, None] for matrix in projections]
    angles = RopeTable(*rope).at(control[:, :1])
    q, k, v = kernels.qkv_rope(parts, [matrix.bias for matrix in projections], angles)
    here = (mx.arange(append[0].shape[2]) == control[:, 2:3])[:, None, :, None]
    return q[:, :, 0], (mx.where(here, k, append[0]), mx.where(here, v, append[1]))


def out_residual(
    x: mx.array, matrix: Matrix, residual: mx.array, *, kernels: KernelSet
) -> mx.array:
    """See `kernels.out_residual`."""
    return reference.out_residual(x, matrix, residual)


def route(
    x: mx.array, norm: mx.array, router: Matrix, *, eps: float, kernels: KernelSet
) -> tuple[mx.array, mx.array]:
    """See `kernels.route`; in float32, which the choice of experts needs."""
    return reference.router_logits(x, norm, router, eps=eps)


def unembed(
    x: mx.array,
    norm: mx.array,
    matrix: Matrix,
    *,
    allowed: mx.array,
    control: mx.array,
    temperature: mx.array,
    eps: float,
    kernels: KernelSet,
) -> tuple[mx.array, mx.array]:
    """See `kernels.unembed`; the matrix is not widened to float32, as its definition does."""
    y = kernels.rms_norm(x, norm, eps=eps)
    logits = reference.final_logits(y, matrix).astype(mx.float32)
    best = definitions.candidates(logits, allowed, control=control, temperature=temperature)
    return logits, best


PRODUCTS: Mapping[str, Callable[..., Any]] = {
    "norm_qkv_rope": norm_qkv_rope,
    "out_residual": out_residual,
    "route": route,
    "unembed": unembed,
}
