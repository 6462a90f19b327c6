// sum_pairs: the down products of sorted pairs, back at their tokens: biased, weighted, summed, and the residual.
//   y[n] = residual[n] + sum_k shares[n,k] * (z[inverse[n,k]] + bias[experts[n,k]])
// Inputs:    z (P,D) T; inverse (P,), experts (N,CHOSEN) u32 and shares (N,CHOSEN) f32, P = N*CHOSEN, in whatever address
//            space MLX gives so few values; bias (E,D) W; residual (N,D) T
// Output:    y (N,D) T
// Grid:      N threadgroups, one for each token, a thread for 8 columns.
// Numerics:  float32, one rounding at the store.
// Requires:  D % 8 == 0 and at most 8192; checked in kernels.sum_pairs.
// Used when: MLX's grouped products of a chunk are done.
// Not fused: the product before it, which is MLX's; the norm after it, which belongs to the next block.
// Source:    our own.
#include "simd.h"

template <int D, int CHOSEN, typename T, typename W, typename Places, typename Ids, typename Shares>
METAL_FUNC void sum_pairs(
    const device T* z, Places inverse, Ids experts, Shares shares, const device W* bias, const device T* residual, device T* y,
    uint3 tile, uint thread_id) {
  const uint column = thread_id * 8;
  if (column >= uint(D)) return;
  const ulong at = ulong(tile.x) * D + column;
  float result[8], product[8], added[8];
  load<8>(residual + at, result);
  UNROLL for (int k = 0; k < CHOSEN; k++) {
    const uint p = tile.x * CHOSEN + k;
    const float share = shares[p];
    load<8>(z + ulong(inverse[p]) * D + column, product);
    load<8>(bias + ulong(experts[p]) * D + column, added);
    UNROLL for (int i = 0; i < 8; i++) result[i] = fma(share, product[i] + added[i], result[i]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) store4(y + at + i, result[i], result[i + 1], result[i + 2], result[i + 3]);
}
