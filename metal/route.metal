// route: RMS norm of the residual stream and the router's logits.
//   y = x / sqrt(mean(x^2) + eps) * norm;  logits[e] = W[e,:] . y + bias[e]
// Inputs:    x (B,D) T; norm (D,) W; weight (E,D) W; bias (E,) W
// Output:    y (B,D) T; logits (B,E) f32
// Grid:      E/4 threadgroups of 4 experts, B deep, one simdgroup for each third of D: one group alone would read
//            the 737 KB of the 120b's router through a single core. Group 0 also stores y.
// Numerics:  float32 throughout; the logits stay float32 and see y before its rounding.
// Requires:  E % 4 == 0; D fills whole simdgroups (matvec.h); checked in kernels.route.
// Used when: one token a row is decoded.
// Not fused: the top-4, which every consumer repeats (choose.h) instead of waiting for another dispatch.
// Source:    our own.
#include "matvec.h"

template <int D, int E, typename F, typename T, typename W>
METAL_FUNC void route(
    const device T* x, const device W* norm, F weight, const device W* bias, device T* y, device float* logits,
    threadgroup float* sums, float eps, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr int groups = Split<D>::groups;
  const uint at = first_load<F>(group, lane);
  Lane<F> values;
  const float squares = simd_sum(stage_normed<F>(x + tile.y * D, norm, at, lane, values));
  if (lane == 0) sums[4 * groups + group] = squares;
  UNROLL for (int i = 0; i < 4; i++) {
    typename F::Row row;
    weight.read(tile.x * 4 + i, at, row);
    const float total = simd_sum(weight.dot(row, values));
    if (lane == 0) sums[group * 4 + i] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float square = 0;
  UNROLL for (int g = 0; g < groups; g++) square += sums[4 * groups + g];
  const float scale = metal::rsqrt(square / D + eps);
  if (thread_id < 4) {
    float total = 0;
    UNROLL for (int g = 0; g < groups; g++) total += sums[g * 4 + thread_id];
    const uint expert = tile.x * 4 + thread_id;
    logits[tile.y * E + expert] = fma(total, scale, float(bias[expert]));
  }
  if (tile.x == 0 && lane < uint(Split<D>::lanes)) {
    UNROLL for (int i = 0; i < 32; i++) {
      const uint column = (at + i / F::per_load * Split<D>::lanes) * F::per_load + i % F::per_load;
      y[tile.y * D + column] = T(values.x[i] * scale);
    }
  }
}
