"""The dense projections of a decode step: embedding, Q/K/V, attention output, router, logits."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, HEAD_DIM, expect, launch, number, require
from mlx_gptoss.kernels.matrix import DenseMatrix, row_blocks, simdgroups
from mlx_gptoss.matrix import Matrix

Segment = tuple[mx.array, mx.array]  # keys and values

ROUTE_ROWS = 2  # of a threadgroup: they stay in registers for the store of y
CONTROL = 8  # int32 columns: position, base, slot, seed low, seed high; 8 keep it in device space


def embed(token: mx.array, matrix: Matrix, *, width: int, dtype: mx.Dtype) -> mx.array:
    """The embedding rows of the current tokens.

    Args:
        token: (B,) int32, each below the vocabulary's size, unchecked.
        matrix: (V, D), plain or affine.
        width: D.
        dtype: of the result.

    Returns:
        (B, D) of `dtype`.
    """
    stem = "embed"
    expect(stem, "token", token, (token.size,), mx.int32)
    weight = DenseMatrix(stem, "table", matrix, rows=matrix.weight.shape[0], columns=width)
    inputs = {"token": token, **weight.inputs}
    (x,) = launch(
        stem,
        inputs,
        {"x": ((token.size, width), dtype)},
        body=f"embed(token, {weight.value}, x, $tile, $lane, $group);",
        groups=(token.size, 1, 1),
        threads=32 * simdgroups(width),
    )
    return x


def norm_qkv_rope(
    x: mx.array,
    norm: mx.array,
    projections: Sequence[Matrix],
    rope: tuple[mx.array, mx.array],
    *,
    control: mx.array,
    append: Segment,
    eps: float,
) -> tuple[mx.array, Segment]:
    """RMS norm, Q/K/V projections, RoPE, and the append of this token's K and V.

    Args:
        x: (B, D), the residual stream.
        norm: (D,).
        projections: of q (Hq*64, D), k and v (Hkv*64, D), each with its bias.
        rope: coarse (C/128, 2, 32) and fine (128, 2, 32) float32, of `RopeTable`.
        control: (B, 8) int32: position, base, slot. The slot must be below the append segment's
            rows: the kernel drops what is not.
        append: keys and values since `base`, (B, Hkv, R, 64) each, in the type of x.
        eps: of the norm.

    Returns:
        q (B, Hq, 64) and the new append segment: rows below the slot copied, the slot's row
        written, rows above it undefined.
    """
    stem = "norm_qkv_rope"
    batch, width = x.shape
    kv_heads, rows = append[0].shape[1:3]
    q_heads = projections[0].weight.shape[0] // HEAD_DIM
    expect(stem, "x", x, (batch, width), *FLOATS)
    expect(stem, "norm", norm, (width,), *FLOATS)
    expect(stem, "control", control, (batch, CONTROL), mx.int32)
    segment = (batch, kv_heads, rows, HEAD_DIM)
    expect(stem, "append keys", append[0], segment, x.dtype)
    expect(stem, "append values", append[1], segment, x.dtype)
    expect(stem, "rope coarse", rope[0], (rope[0].shape[0], 2, 32), mx.float32)
    expect(stem, "rope fine", rope[1], (128, 2, 32), mx.float32)
    inputs, weights, biases = {"x": x, "norm": norm}, [], []
    for name, matrix, heads in zip("qkv", projections, (q_heads, kv_heads, kv_heads), strict=True):
        weight = DenseMatrix(stem, f"w{name}", matrix, rows=heads * HEAD_DIM, columns=width)
        assert matrix.bias is not None
        expect(stem, f"{name} bias", matrix.bias, (heads * HEAD_DIM,), norm.dtype)
        inputs |= {**weight.inputs, f"b{name}": matrix.bias}
        weights.append(weight.value)
        biases.append(f"b{name}")
    inputs |= {"coarse": rope[0], "fine": rope[1], "control": control}
    inputs |= {"keys": append[0], "values": append[1]}
    groups, cut = simdgroups(width), row_blocks(batch, width)
    body = (
        f"threadgroup float sums[{(16 * cut.tiles + 1) * groups * cut.vectors}];\n"
        f"norm_qkv_rope<{width}, {q_heads}, {kv_heads}, {rows}, {cut.template}, {cut.tiles}>"
        f"(x, norm, {', '.join(weights)}, {', '.join(biases)}, coarse, fine, control, keys, "
        f"values, q, new_keys, new_values, sums, {number(eps)}, {cut.batch}, "
        "$tile, $thread_id, $lane, $group);"
    )
    q, keys, values = launch(
        stem,
        inputs,
        {
            "q": ((batch, q_heads, HEAD_DIM), x.dtype),
            "new_keys": (segment, x.dtype),
            "new_values": (segment, x.dtype),
        },
        body=body,
        groups=((q_heads + 2 * kv_heads) * 4 // cut.tiles + 2 * kv_heads, cut.groups, 1),
        threads=32 * cut.simdgroups,
    )
    return q, (keys, values)


def out_residual(x: mx.array, matrix: Matrix, residual: mx.array) -> mx.array:
    """The attention's output projection with bias, added to the residual stream.

    Args:
        x: (B, Hq*64).
        matrix: (D, Hq*64) with bias.
        residual: (B, D) in the type of x.

    Returns:
        (B, D) in the type of x.
    """
    stem = "out_residual"
    (batch, columns), width = x.shape, residual.shape[-1]
    expect(stem, "x", x, (batch, columns), *FLOATS)
    expect(stem, "residual", residual, (batch, width), x.dtype)
    require(stem, width % 16 == 0, "rows", "a multiple of 16", width)
    weight = DenseMatrix(stem, "wo", matrix, rows=width, columns=columns)
    assert matrix.bias is not None
    expect(stem, "bias", matrix.bias, (width,), *FLOATS)
    inputs = {"x": x, **weight.inputs, "bias": matrix.bias, "residual": residual}
    groups, cut = simdgroups(columns), row_blocks(batch, columns)
    body = (
        f"threadgroup float sums[{16 * groups * cut.vectors}];\n"
        f"out_residual<{width}, {columns}, {cut.template}>(x, {weight.value}, bias, "
        f"residual, y, sums, {cut.batch}, $tile, $thread_id, $lane, $group);"
    )
    (y,) = launch(
        stem,
        inputs,
        {"y": ((batch, width), x.dtype)},
        body=body,
        groups=(width // 16, cut.groups, 1),
        threads=32 * cut.simdgroups,
    )
    return y


def route(x: mx.array, norm: mx.array, router: Matrix, *, eps: float) -> tuple[mx.array, mx.array]:
    """The norm before the experts and the router's logits; consumers choose from them.

    Args:
        x: (B, D), the residual stream.
        norm: (D,).
        router: (E, D) with bias.
        eps: of the norm.

    Returns:
        y (B, D) in the type of x, normalised; logits (B, E) float32.
    """
    stem = "route"
    (batch, width), experts = x.shape, router.weight.shape[0]
    expect(stem, "x", x, (batch, width), *FLOATS)
    expect(stem, "norm", norm, (width,), *FLOATS)
    require(stem, experts % 4 == 0, "experts", "a multiple of 4", experts)
    weight = DenseMatrix(stem, "wr", router, rows=experts, columns=width)
    assert router.bias is not None
    expect(stem, "bias", router.bias, (experts,), norm.dtype)
    inputs = {"x": x, "norm": norm, **weight.inputs, "bias": router.bias}
    groups, each = simdgroups(width), min(batch, ROUTE_ROWS)
    body = (
        f"threadgroup float sums[{5 * groups * each}];\n"
        f"route<{width}, {experts}, {each}>(x, norm, {weight.value}, bias, y, logits, sums, "
        f"{number(eps)}, {'x_shape[0]' if each > 1 else 1}, $tile, $thread_id, $lane, $group);"
    )
    y, logits = launch(
        stem,
        inputs,
        {"y": ((batch, width), x.dtype), "logits": ((batch, experts), mx.float32)},
        body=body,
        groups=(experts // 4, -(-batch // each), 1),
        threads=32 * groups,
    )
    return y, logits
