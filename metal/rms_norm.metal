// rms_norm: RMS norm of rows.
//   y = x / sqrt(mean(x^2) + eps) * weight
// Inputs:    x (N,D) T; weight (D,) W
// Output:    y (N,D) T
// Grid:      N threadgroups of one simdgroup for each third of D (matvec.h); a lane stores the 32 columns it reads.
// Numerics:  float32 throughout, one rounding at the store: MLX's own kernel rounds before it multiplies by the weight.
// Requires:  D fills whole simdgroups (matvec.h); T not narrower than W; checked in kernels.rms_norm.
// Used when: a chunk enters attention, or the unembedding.
// Not fused: the projections after it, which are MLX's; the sum before it, which is the residual stream.
// Source:    our own.
#include "matvec.h"

template <int D, typename T, typename W>
METAL_FUNC void rms_norm(
    const device T* x, const device W* weight, device T* y, threadgroup float* sums, float eps, uint3 tile, uint lane,
    uint group) {
  typedef Plain<W, D> F;
  constexpr int groups = Split<D>::groups;
  const uint at = first_load<F>(group, lane);
  Vectors<1, F> vector;
  vector.stage(x, Normed<W>{weight}, tile.x, 1, at, lane);
  const float part = simd_sum(vector.squares[0]);
  if (lane == 0) sums[group] = part;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float square = 0;
  UNROLL for (int g = 0; g < groups; g++) square += sums[g];
  if (lane < uint(Split<D>::lanes)) vector.store(0, y + tile.x * D, metal::rsqrt(square / D + eps), at);
}
