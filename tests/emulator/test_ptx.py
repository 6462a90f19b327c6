"""The PTX back end: the same source through another compiler."""

import shutil
import sys

import numpy as np
import pytest

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import CompileError, Kernel, cuda, ptx
from tests.emulator.mlx_kernels import ATTENTION_CONSTANTS
from tests.emulator.mlx_kernels import source as mlx_source
from tests.emulator.mutations import CASES
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


QUANTISED = ("steel/gemm/gemm.h", "quantized_utils.h")
MLX_KERNELS = [
    ("fp_qmv_fast<float, 32, 4, false>", (*QUANTISED, "fp_quantized.h")),
    ("affine_gather_qmv<half, 64, 4>", (*QUANTISED, "quantized.h")),
    ("softmax_single_row<bfloat16_t, float>", ("softmax.h",)),
    ("sdpa_vector<bfloat16_t, 64, 64>", ("sdpa_vector.h",)),
]


@pytest.mark.parametrize(("instance", "headers"), MLX_KERNELS, ids=lambda v: v if "<" in v else "")
def test_kernels_of_mlx_compile(instance: str, headers: tuple[str, ...]) -> None:
    constants = ATTENTION_CONSTANTS if instance.startswith("sdpa") else {}
    kernel = ptx.build(mlx_source(*headers), instance, constants=constants)
    assert any(op.startswith("shfl.sync") for op in kernel.instructions)


@pytest.fixture
def gpu() -> str:
    """The architecture of the NVIDIA GPU here; without one the test is skipped, and says so."""
    try:
        return cuda.architecture()
    except EmulatorError as error:
        pytest.skip(f"no NVIDIA GPU to run PTX on: {error}")


@pytest.mark.parametrize("name", ["mxfp4_rows", "scan"])
def test_the_gpu_agrees_with_the_emulator(
    name: str, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    made = ptx.build(case.source(), case.function, arch=gpu)
    buffers = case.buffers()
    size = {"grid": case.grid, "threadgroup": case.threadgroup}
    Kernel(case.source(), case.function)(emulated := case.buffers(), **size)
    cuda.run(made, buffers, **size)
    for output, wanted in case.wanted().items():
        scale = np.abs(wanted).max()
        both = buffers[output].array().astype(float), emulated[output].array().astype(float)
        np.testing.assert_allclose(*both, rtol=0, atol=1e-5 * scale)
    seconds = cuda.run(made, case.buffers(), **size, repeats=21)
    with capsys.disabled():
        share = cuda.bandwidth_share(buffers, seconds)
        figures = f"{seconds * 1e6:.1f} us, {share:.1%} of nominal bandwidth"
        sys.stdout.write(f"\n{name} on {gpu}: {figures}\n")


def test_without_a_driver_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    cuda.driver.cache_clear()
    with pytest.raises(EmulatorError, match="no NVIDIA driver: libcuda was not found"):
        cuda.architecture()
    kernel = ptx.build(SOURCE, "row_sum<float>")
    with pytest.raises(ValueError, match=r"grid .* is not a multiple of threadgroup"):
        cuda.run(kernel, {}, grid=(100, 1, 1), threadgroup=(64, 1, 1))
