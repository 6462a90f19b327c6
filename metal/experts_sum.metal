// experts_sum: the sums of experts_down_grouped with bias, and the residual: what experts_down returns.
//   y[b,j] = residual[b,j] + sum_k share[b,k] * bias[e[b,k],j] + sum_k,i sums[b,k,i,j]
// Inputs:    sums (B,CHOSEN,PARTS,N) f32; choice (B,CHOSEN,2) f32: expert and share; bias (E,N) W; residual (B,N) T
// Output:    y (B,N) T
// Grid:      N/32 x B threadgroups of one simdgroup, a value a thread.
// Numerics:  the order of experts_down, so the same bits; one rounding at the store.
// Requires:  N % 32 == 0; checked in kernels.experts_sum.
// Used when: after experts_down_grouped.
// Not fused: the next layer's norm; it needs the whole of y.
// Source:    our own.
#include "simd.h"

template <int N, int CHOSEN, int PARTS, typename T, typename W>
METAL_FUNC void experts_sum(
    const device float* sums, const device float* choice, const device W* bias, const device T* residual, device T* y,
    uint3 tile, uint lane) {
  const uint b = tile.y, n = tile.x * 32 + lane;
  float result = float(residual[b * N + n]);
  UNROLL for (int k = 0; k < CHOSEN; k++) {
    const device float* own = choice + 2 * (b * CHOSEN + k);
    result = fma(own[1], float(bias[uint(own[0]) * N + n]), result);
  }
  UNROLL for (int i = 0; i < CHOSEN * PARTS; i++) result += sums[(b * CHOSEN * PARTS + i) * N + n];
  y[b * N + n] = T(result);
}
