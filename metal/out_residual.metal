// out_residual: the attention's output projection with bias, added to the residual stream.
//   y[b,j] = residual[b,j] + W[j,:] . x[b,:] + bias[j]
// Inputs:    x (B,COLS) T; weight (N,COLS) in format F; bias (N,) W; residual (B,N) T
// Output:    y (B,N) T
// Grid:      N/16 threadgroups of 16 rows, B deep; one simdgroup for each 1024 columns (4096 = 4): 128 threads,
//            180 groups on the real models, so that 80 cores still have two each.
// Numerics:  float32 sums, one rounding at the store.
// Requires:  N % 16 == 0; COLS fills whole simdgroups (matvec.h); checked in kernels.out_residual.
// Used when: one token a row is decoded.
// Not fused: the attention before it (every row needs all heads) and the norm after it (every row of the next
//            projection needs all of y).
// Source:    our own.
#include "matvec.h"

template <int N, int COLS, typename F, typename T, typename W>
METAL_FUNC void out_residual(
    const device T* x, F weight, const device W* bias, const device T* residual, device T* y,
    threadgroup float* sums, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr int groups = Split<COLS>::groups;
  const uint row = tile.x * 16, at = first_load<F>(group, lane);
  Lane<F> values;
  stage<F>(x + tile.y * COLS, at, lane, values);
  sum_loads<F>(values);
  const float total = dot16<8>(weight, row, at, lane, values);
  if (lane % 2 == 0) sums[group * 16 + lane / 2] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id >= 16) return;
  const uint out = tile.y * N + row + thread_id;
  float result = float(residual[out]) + float(bias[row + thread_id]);
  UNROLL for (int g = 0; g < groups; g++) result += sums[g * 16 + thread_id];
  y[out] = T(result);
}
