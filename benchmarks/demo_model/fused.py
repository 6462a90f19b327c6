"""Autograd functions over `fused.c`: clamped SwiGLU, and softmax with sinks.

A training step is bound by memory on a CPU, and these two chains of elementwise operations were two
thirds of it. The C file is compiled at first use by the system's compiler.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor


@functools.cache
def _library() -> ctypes.CDLL:
    built = Path(tempfile.mkdtemp()) / "fused.so"
    source = Path(__file__).with_name("fused.c")
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(built), "-lmvec", "-lm"], check=True)
    return ctypes.CDLL(str(built))


def _pointer(array: Tensor) -> ctypes.c_void_p:
    assert array.is_contiguous()
    return ctypes.c_void_p(array.data_ptr())


class Swiglu(torch.autograd.Function):
    """(up + 1) * gate * sigmoid(1.702 gate) of (..., 2 * width) bfloat16, gate half first.

    Gate is clamped to at most 7, up to -7 .. 7; outside, the gradient is zero.
    """

    @staticmethod
    def forward(ctx, wide: Tensor) -> Tensor:
        """(..., 2 * width) -> (..., width)."""
        ctx.save_for_backward(wide)
        width = wide.shape[-1] // 2
        out = wide.new_empty(*wide.shape[:-1], width)
        rows = ctypes.c_long(out.numel() // width)
        _library().swiglu_forward(_pointer(wide), _pointer(out), rows, ctypes.c_long(width))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The gradient of both halves."""
        (wide,) = ctx.saved_tensors
        grad = grad.contiguous()
        out, width = torch.empty_like(wide), grad.shape[-1]
        _library().swiglu_backward(
            _pointer(wide), _pointer(grad), _pointer(out),
            ctypes.c_long(grad.numel() // width), ctypes.c_long(width),
        )  # fmt: skip
        return out


class SinkSoftmax(torch.autograd.Function):
    """softmax over (scores * scale + mask, sink) without the sink's column."""

    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor, sinks: Tensor, scale: float) -> Tensor:
        """Scores (N, heads, queries, keys) bfloat16, mask (N, queries, keys), sinks (heads)."""
        scores = scores.contiguous()
        out = torch.empty_like(scores)
        ctx.sizes = [ctypes.c_long(size) for size in scores.shape]
        ctx.scale = ctypes.c_float(scale)
        _library().softmax_forward(
            _pointer(scores), _pointer(mask), _pointer(sinks), _pointer(out), *ctx.sizes, ctx.scale
        )
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """Gradients of scores and sinks."""
        (weights,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(weights)
        sinks = torch.zeros(weights.shape[1])
        _library().softmax_backward(
            _pointer(weights), _pointer(grad), _pointer(out), _pointer(sinks), *ctx.sizes, ctx.scale
        )
        return out, None, sinks, None
