// route: RMS norm of the residual stream and the router's logits.
//   y = x / sqrt(mean(x^2) + eps) * norm;  logits[e] = W[e,:] . y + bias[e]
// Inputs:    x (B,D) T; norm (D,) W; weight (E,D) W; bias (E,) W
// Output:    y (B,D) T; logits (B,E) f32
// Grid:      E/4 threadgroups of 4 experts, one simdgroup for each third of D: one group alone would read
//            the 737 KB of the 120b's router through a single core. Group 0 also stores y. In a batch a threadgroup
//            has R = 2 vectors, kept for y; the weights are too few to share them among more. Deep enough for B.
// Numerics:  float32 throughout; the logits stay float32 and see y before its rounding.
// Requires:  E % 4 == 0; D fills whole simdgroups (matvec.h); checked in kernels.route.
// Used when: one token a row is decoded.
// Not fused: the top-4, which every consumer repeats (choose.h) instead of waiting for another dispatch.
// Source:    our own.
#include "matvec.h"

template <int D, int E, int R, typename F, typename T, typename W>
METAL_FUNC void route(
    const device T* x, const device W* norm, F weight, const device W* bias, device T* y, device float* logits,
    threadgroup float* sums, float eps, uint batch, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr int groups = Split<D>::groups;
  const uint at = first_load<F>(group, lane), first = tile.y * R;
  Vectors<R, F> vectors;
  vectors.stage(x, Normed<W>{norm}, first, batch, at, lane);
  UNROLL for (int r = 0; r < R; r++) {
    const float square = simd_sum(vectors.squares[r]);
    if (lane == 0) sums[(r * groups + group) * 5 + 4] = square;
  }
  UNROLL for (int n = 0; n < 4; n++) {
    typename F::Load row[F::loads];
    UNROLL for (int i = 0; i < F::loads; i++) weight.read(tile.x * 4 + n, at + i * Split<D>::lanes, row[i]);
    float products[R];
    dot<R, F>(row, vectors, products, 1);
    UNROLL for (int r = 0; r < R; r++) {
      const float total = simd_sum(products[r]);
      if (lane == 0) sums[(r * groups + group) * 5 + n] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int r = 0; r < R; r++) {
    const uint b = first + r;
    if (R > 1 && b >= batch) return;
    float square = 0;
    UNROLL for (int g = 0; g < groups; g++) square += sums[(r * groups + g) * 5 + 4];
    const float scale = metal::rsqrt(square / D + eps);
    if (thread_id < 4) {
      float total = 0;
      UNROLL for (int g = 0; g < groups; g++) total += sums[(r * groups + g) * 5 + thread_id];
      const uint expert = tile.x * 4 + thread_id;
      logits[b * E + expert] = fma(total, scale, float(bias[expert]));
    }
    if (tile.x == 0 && lane < uint(Split<D>::lanes)) vectors.store(r, y + b * D, scale, at);
  }
}
