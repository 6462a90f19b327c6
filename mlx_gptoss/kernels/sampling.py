"""The end of a decode step: logits of the vocabulary, and the next token without the host."""

import mlx.core as mx

from mlx_gptoss.kernels.launch import FLOATS, expect, launch, number, require
from mlx_gptoss.kernels.matrix import DenseMatrix, row_blocks, simdgroups
from mlx_gptoss.kernels.projections import CONTROL
from mlx_gptoss.matrix import Matrix

TILE = 64  # logits of a threadgroup
SAMPLING = 8  # columns: temperature, top-k, top-p, min-p; 8 for the reason that CONTROL has


def unembed(
    x: mx.array,
    norm: mx.array,
    matrix: Matrix,
    *,
    allowed: mx.array,
    control: mx.array,
    temperature: mx.array,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """The final norm, the logits, and one candidate for the next token out of every 64.

    Args:
        x: (B, D), the residual stream.
        norm: (D,).
        matrix: (V, D), plain or affine.
        allowed: (B, V/32) uint32, tokens that may be chosen; see `sampling.packed`.
        control: (B, 8) int32: position, base, slot, seed low, seed high.
        temperature: (B, 8) float32, in column 0; 0 is greedy.
        eps: of the norm.

    Returns:
        logits (B, V) float32, and best (B, V/64, 4) float32: the candidate's score and id, and the
        maximum m and sum exp(logit - m) of the allowed logits.
    """
    stem = "unembed"
    (batch, width), vocabulary = x.shape, matrix.weight.shape[0]
    expect(stem, "x", x, (batch, width), *FLOATS)
    expect(stem, "norm", norm, (width,), *FLOATS)
    expect(stem, "allowed", allowed, (batch, vocabulary // 32), mx.uint32)
    expect(stem, "control", control, (batch, CONTROL), mx.int32)
    expect(stem, "temperature", temperature, (batch, CONTROL), mx.float32)
    good = vocabulary % TILE == 0 and 256 <= vocabulary < 2**24  # 8 words of `allowed` at least
    require(stem, good, "vocabulary", f"a multiple of {TILE} from 256 to 2^24", vocabulary)
    weight = DenseMatrix(stem, "head", matrix, rows=vocabulary, columns=width)
    inputs = {"x": x, "norm": norm, **weight.inputs, "allowed": allowed}
    inputs |= {"control": control, "temperature": temperature}
    groups, cut = simdgroups(width), row_blocks(batch, width)
    tiles = cut.tiles if vocabulary % (cut.tiles * TILE) == 0 else 1
    body = (
        f"threadgroup float sums[{(TILE * tiles + 1) * groups * cut.vectors}];\n"
        f"unembed<{width}, {vocabulary}, {cut.template}, {tiles}>(x, norm, {weight.value}, "
        f"allowed, control, temperature, logits, best, sums, {number(eps)}, {cut.batch}, "
        "$tile, $lane, $group);"
    )
    logits, best = launch(
        stem,
        inputs,
        {
            "logits": ((batch, vocabulary), mx.float32),
            "best": ((batch, vocabulary // TILE, 4), mx.float32),
        },
        body=body,
        groups=(vocabulary // (TILE * tiles), cut.groups, 1),
        threads=32 * cut.simdgroups,
    )
    return logits, best


def sample_token(
    best: mx.array, logits: mx.array, *, control: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The next token out of `unembed`'s candidates.

    Args:
        best: (B, V/64, 4) float32.
        logits: (B, V) float32.
        control: (B, 8) int32.

    Returns:
        token (B,) int32; its log-probability (B,) float32 among the allowed tokens, at temperature
        1; the next step's control (B, 8): position and slot one further.
    """
    stem = "sample_token"
    (batch, vocabulary), tiles = logits.shape, best.shape[1]
    expect(stem, "best", best, (batch, vocabulary // TILE, 4), mx.float32)
    expect(stem, "logits", logits, (batch, vocabulary), mx.float32)
    expect(stem, "control", control, (batch, CONTROL), mx.int32)
    body = (
        "threadgroup float shared[32];\n"
        f"sample_token<{vocabulary}, {tiles}>(best, logits, control, token, logprob, next, shared, "
        "$tile, $thread_id, $lane, $group);"
    )
    token, logprob, following = launch(
        stem,
        {"best": best, "logits": logits, "control": control},
        _next_token(control),
        body=body,
        groups=(batch, 1, 1),
        threads=256,
    )
    return token, logprob, following


def sample_filtered(
    best: mx.array,
    logits: mx.array,
    *,
    allowed: mx.array,
    control: mx.array,
    sampling: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """The next token among those that each row's top-k, top-p and min-p leave.

    The token of a row without any of them is `sample_token`'s.

    Args:
        best: (B, V/64, 4) float32.
        logits: (B, V) float32.
        allowed: (B, V/32) uint32, tokens that may be chosen; see `sampling.packed`.
        control: (B, 8) int32.
        sampling: (B, 8) float32: temperature, 0 is greedy; top-k, 0 is off; top-p, 1 is off; min-p,
            0 is off.

    Returns:
        As `sample_token`.
    """
    stem = "sample_filtered"
    (batch, vocabulary), tiles = logits.shape, best.shape[1]
    require(stem, vocabulary < 2**22, "vocabulary", "less than 2^22", vocabulary)
    expect(stem, "best", best, (batch, vocabulary // TILE, 4), mx.float32)
    expect(stem, "logits", logits, (batch, vocabulary), mx.float32)
    expect(stem, "allowed", allowed, (batch, vocabulary // 32), mx.uint32)
    expect(stem, "control", control, (batch, CONTROL), mx.int32)
    expect(stem, "sampling", sampling, (batch, SAMPLING), mx.float32)
    body = (
        "threadgroup uint bins[2048], sums[18];\nthreadgroup float floats[16];\n"
        f"sample_filtered<{vocabulary}, {tiles}>(best, logits, allowed, control, sampling, token, "
        "logprob, next, bins, sums, floats, $tile, $thread_id, $lane, $group);"
    )
    inputs = {"best": best, "logits": logits, "allowed": allowed}
    token, logprob, following = launch(
        stem,
        inputs | {"control": control, "sampling": sampling},
        _next_token(control),
        body=body,
        groups=(batch, 1, 1),
        threads=512,
    )
    return token, logprob, following


def _next_token(control: mx.array) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """What both kernels that choose a token write."""
    batch = control.shape[0]
    return {
        "token": ((batch,), mx.int32),
        "logprob": ((batch,), mx.float32),
        "next": (control.shape, mx.int32),
    }
