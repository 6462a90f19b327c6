"""A small kernel for the emulator's own tests: sums of the rows of a matrix."""

import numpy as np

from mlx_gptoss.metal.emulator import Buffer, Kernel, Mode, Report

ROWS, COLUMNS, THREADS = 5, 1000, 128
SOURCE = """#line 1 "row_sum.metal"
using namespace metal;
template <typename T>
kernel void row_sum(const device T* x [[buffer(0)]], device float* y [[buffer(1)]],
                    constant uint& n [[buffer(2)]], uint row [[threadgroup_position_in_grid]],
                    uint tid [[thread_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float part[4];  // a comment; with a semicolon
  float sum = 0;
  for (uint i = tid; i < n; i += 128) sum += float(x[row * n + i]);
  sum = simd_sum(sum);
  if (lane == 0) part[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid == 0) y[row] = part[0] + part[1] + part[2] + part[3];
}
"""
X = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def run(
    source: str = SOURCE, *, mode: Mode = Mode.INSTRUMENTED, **options
) -> tuple[np.ndarray, Report]:
    """Run the kernel over X and return its sums and the report."""
    buffers = {
        "x": Buffer.of(X),
        "y": Buffer.empty((ROWS,), "float32"),
        "n": Buffer.of(np.array(COLUMNS, np.uint32)),
    } | options.pop("buffers", {})
    kernel = Kernel(source, "row_sum<float>", mode=mode)
    size = {"grid": (ROWS * THREADS, 1, 1), "threadgroup": (THREADS, 1, 1)} | options
    report = kernel(buffers, **size)
    return buffers["y"].array(), report
