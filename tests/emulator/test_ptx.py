"""The PTX back end: the same source through another compiler."""

import shutil

import pytest

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import CompileError, ptx
from tests.emulator.row_sum import SOURCE


def test_row_sum_compiles() -> None:
    kernel = ptx.build(SOURCE, "row_sum<float>")
    assert kernel.stack_bytes == 0
    assert kernel.shared_bytes == 16
    assert kernel.instructions["shfl.sync.idx.b32"] == 5  # one simd_sum
    assert sum(n for op, n in kernel.instructions.items() if op.startswith("bar")) == 1
    if shutil.which("ptxas"):
        assert kernel.spill_bytes == 0
        assert kernel.registers is not None and 8 <= kernel.registers <= 64
    else:
        assert kernel.registers is None and kernel.spill_bytes is None


def test_an_array_indexed_by_a_variable_shows_as_stack() -> None:
    body = "float a[8]; for (uint i = 0; i < 8; i++) a[i] = float(x[i]); float sum = a[n % 8];"
    kernel = ptx.build(SOURCE.replace("float sum = 0;", body), "row_sum<half>")
    assert kernel.stack_bytes >= 32


def test_errors() -> None:
    with pytest.raises(
        CompileError, match=r"row_sum.metal:11:9: error: use of undeclared identifier"
    ):
        ptx.build(SOURCE.replace("simd_sum", "simdsum"), "row_sum<float>")
    dynamic = SOURCE.replace(
        "uint row [[", "threadgroup float* more [[threadgroup(0)]], uint row [["
    )
    with pytest.raises(EmulatorError, match=r"\[\[threadgroup\(n\)\]\] arguments have no PTX form"):
        ptx.build(dynamic, "row_sum<float>")
    with pytest.raises(EmulatorError, match=r"ptxas refuses|does not compile"):
        ptx.build(SOURCE, "row_sum<float>", arch="sm_1")
