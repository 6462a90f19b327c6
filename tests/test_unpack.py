"""Packed weights as numbers, by our arithmetic and by MLX's."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import write_checkpoint

from mlx_gptoss.convert import convert_checkpoint
from mlx_gptoss.model import load_model
from mlx_gptoss.unpack import bits_of, dense_rows, numbers


@pytest.mark.parametrize("packing", ["bf16", "q8", "q4"])
def test_unpacking_by_hand_equals_mlx(tmp_path, packing):
    convert_checkpoint(write_checkpoint(tmp_path / "s", layers=1), tmp_path / "m", dense=packing)
    attention, moe = load_model(tmp_path / "m").layers[0]
    for stack, expert in ((attention.q, None), (moe.gate, 5), (moe.down, 11)):
        rows = np.array([0, 3, stack.weight.shape[-2] - 1])
        want = stack.weight
        if stack.mode is not None:
            wide = [
                None if a is None else a.astype(mx.float32) for a in (stack.scales, stack.offsets)
            ]
            scales = [stack.scales, None] if stack.mode == "mxfp4" else wide
            form = {"group_size": stack.group_size, "bits": stack.bits, "mode": stack.mode}
            want = mx.dequantize(stack.weight, *scales, **form, dtype=mx.float32)
        want = numbers(want if expert is None else want[expert])[rows]
        got = dense_rows(stack, rows, expert)
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    assert bits_of(mx.array([1.0], mx.bfloat16)).tolist() == [0x3F80]
