"""`mx.fast.metal_kernel` inside `emulate`: MLX writes the source, the emulator runs it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import CompileError, KernelFault, emulate

HEADER = """#line 1 "rms.metal"
// y = x / sqrt(mean(x^2) + eps), one row a threadgroup of 96
template <typename T, typename E>
void rms(const device T* x, E eps, device T* y, threadgroup float* part, uint row, uint tid,
         int n) {
  float sum = 0;
  for (int i = tid; i < n; i += 96) sum += float(x[row * n + i]) * float(x[row * n + i]);
  sum = simd_sum(sum);
  if (tid % 32 == 0) part[tid / 32] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = part[0] + part[1] + part[2];
  float scale = metal::precise::rsqrt(sum / n + eps[0]);
  for (int i = tid; i < n; i += 96) y[row * n + i] = static_cast<T>(float(x[row * n + i]) * scale);
}
"""
SOURCE = """threadgroup float part[3];
rms(x, eps, y, part, threadgroup_position_in_grid.x, thread_index_in_threadgroup, x_shape[1]);"""


def call(header: str = HEADER, dtype: mx.Dtype = mx.float32, rows: int = 7):
    kernel = mx.fast.metal_kernel(
        name="rms", input_names=["x", "eps"], output_names=["y"], source=SOURCE, header=header
    )
    x = mx.random.normal((rows, 300), key=mx.random.key(3)).astype(dtype)
    y = kernel(
        inputs=[x, mx.array([1e-5])],
        grid=(rows * 96, 1, 1),
        threadgroup=(96, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[dtype],
    )[0]
    wanted = mx.fast.rms_norm(x.astype(mx.float32), None, 1e-5)
    error = mx.abs(y.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
    return kernel, error.item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.float16, 1e-3), (mx.bfloat16, 5e-3)]
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_agrees_with_mlx(dtype: mx.Dtype, tolerance: float, order: str) -> None:
    with emulate(order=order) as session:
        _, error = call(dtype=dtype)
    assert error <= tolerance
    (report,) = session.reports
    assert report.lines["rms.metal", 6].load_bytes == 7 * 300 * dtype.size
    assert report.traffic("x").distinct_sectors * 32 >= 7 * 300 * dtype.size


def test_sampling_and_plain_mode() -> None:
    with emulate(threadgroups=2) as session:
        call()
    assert session.reports[0].threadgroups_run == 2
    with emulate(mode="plain") as session:
        _, error = call()
    assert error <= 2e-6
    assert not session.reports[0].lines


def test_faults_name_the_line_of_the_metal_file() -> None:
    broken = HEADER.replace("  threadgroup_barrier(mem_flags::mem_threadgroup);\n", "\n")
    with emulate() as session, pytest.raises(KernelFault, match=r"rms.metal:10: threadgroup-race"):
        call(broken)
    assert "threadgroup-race" in {f.check for f in session.reports[0].findings}
    with emulate(), pytest.raises(CompileError, match=r"rms.metal:7:9: error: use of undeclared"):
        call(HEADER.replace("simd_sum", "simdsum"))


def test_the_replacement_ends_with_the_block() -> None:
    real = mx.fast.metal_kernel
    with emulate():
        assert mx.fast.metal_kernel is not real
        kernel, _ = call()
        with emulate(order="reverse") as inner:
            call()
        assert inner.reports[0].order == "reverse"
    assert mx.fast.metal_kernel is real
    with pytest.raises(
        EmulatorError, match="kernel 'rms' was made inside `emulate`; call it inside"
    ):
        kernel(
            inputs=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[],
            output_dtypes=[],
        )


def test_shapes_strides_and_initial_values() -> None:
    """Generated shape buffers, a scalar input, and an output that the kernel only adds to."""
    with emulate():
        kernel = mx.fast.metal_kernel(
            name="add_some",
            input_names=["values", "amount"],
            output_names=["total"],
            source="""uint i = thread_position_in_grid.x;
            float more = amount * values_strides[0] + values_shape[1] + values_ndim;
            if (i % 3 == 0) total[i] += more;""",
        )
        (total,) = kernel(
            inputs=[mx.zeros((5, 9)), mx.array(2.0)],
            grid=(45, 1, 1),
            threadgroup=(45, 1, 1),
            output_shapes=[(45,)],
            output_dtypes=[mx.float32],
            init_value=0.5,
        )
    wanted = np.where(np.arange(45) % 3 == 0, 0.5 + 2 * 9 + 9 + 2, 0.5)
    assert np.array(total).tolist() == wanted.tolist()
