// out_residual: the attention's output projection with bias, added to the residual stream.
//   y[b,j] = residual[b,j] + W[j,:] . x[b,:] + bias[j]
// Inputs:    x (B,COLS) T; weight (N,COLS) in format F; bias (N,) W; residual (B,N) T
// Output:    y (B,N) T
// Grid:      N/16 threadgroups of 16 rows; one simdgroup for each 1024 columns (4096 = 4): 128 threads,
//            180 groups on the real models, so that 80 cores still have two each: in a batch too, where 32 rows would
//            halve the reads of x and leave 90. In a batch R = 2 vectors a simdgroup and up to 8 such blocks a
//            threadgroup, which read a weight together; from 4 blocks on a simdgroup walks PARTS = 2 or 4 of the
//            column parts (norm_qkv_rope says why). Deep enough for B.
// Numerics:  float32 sums, one rounding at the store.
// Requires:  N % 16 == 0; COLS fills whole simdgroups (matvec.h); checked in kernels.out_residual.
// Used when: one token a row is decoded.
// Not fused: the attention before it (every row needs all heads) and the norm after it (every row of the next
//            projection needs all of y).
// Source:    our own.
#include "matvec.h"

template <int N, int COLS, int R, int BLOCKS, int PARTS, typename F, typename T, typename W>
METAL_FUNC void out_residual(
    const device T* x, F weight, const device W* bias, const device T* residual, device T* y,
    threadgroup float* sums, uint batch, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr int groups = Split<COLS>::groups, ways = groups / PARTS, vectors = R * BLOCKS;
  const uint row = tile.x * 16, first = tile.y * vectors, block = group / ways * R;
  for (int i = 0; i < PARTS; i++) {
    const uint part = group % ways * PARTS + i, at = first_load<F>(part, lane);
    Vectors<R, F> values;
    values.stage(x, Unnormed(), first + block, batch, at, lane);
    dot16<8>(weight, row, at, lane, values, sums + (block * groups + part) * 16, groups * 16);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_id; i < 16 * vectors; i += 32 * ways * BLOCKS) {
    const uint vector = i / 16, b = first + vector, n = i % 16;
    if (R > 1 && b >= batch) return;
    float result = float(residual[b * N + row + n]) + float(bias[row + n]);
    UNROLL for (int g = 0; g < groups; g++) result += sums[(vector * groups + g) * 16 + n];
    y[b * N + row + n] = T(result);
  }
}
