// route_prefill: RMS norm of a chunk's rows, the router's logits, the CHOSEN largest of them, and their softmax.
//   y = x / sqrt(mean(x^2) + eps) * norm;  l[e] = W[e,:] . y + bias[e];  shares = softmax of the largest l
// Inputs:    x (N,D) T; norm (D,) W; weight (E,D) in format F; bias (E,) W
// Output:    y (N,D) T; experts (N,CHOSEN) u32, the largest logit first, ties to the lower index; shares (N,CHOSEN) f32
// Grid:      a threadgroup for each 2 * BLOCKS rows, which it keeps for y: BLOCKS blocks of two rows, a simdgroup for
//            each third of D, 12 simdgroups in all, which read a weight together. The weights are read N / 8 times, out
//            of a cache: 64 threadgroups for 512 rows, each with all experts, so that the choice needs no other dispatch.
// Numerics:  float32 throughout, on any chip; the logits see y before its rounding.
// Requires:  D fills whole simdgroups (matvec.h); E >= CHOSEN; the logits of a threadgroup fit; checked in
//            kernels.route_prefill.
// Used when: several tokens a row are read.
// Not fused: the order of the pairs, which needs the choice of every row.
// Source:    our own.
#include "choose.h"
#include "matvec.h"

// 1 / sqrt(mean + eps) of a row, whose squares were added in parts.
template <int D, int PARTS>
METAL_FUNC float inverse_norm(const threadgroup float* squares, uint stride, float eps) {
  float total = 0;
  UNROLL for (int g = 0; g < PARTS; g++) total += squares[g * stride];
  return metal::rsqrt(total / D + eps);
}

template <int D, int E, int CHOSEN, int BLOCKS, typename F, typename T, typename W>
METAL_FUNC void route_prefill(
    const device T* x, const device W* norm, F weight, const device W* bias, device T* y, device uint* experts,
    device float* shares, threadgroup float* sums, threadgroup float* logits, float eps, uint rows, uint3 tile,
    uint thread_id, uint lane, uint group) {
  constexpr int parts = Split<D>::groups, simds = parts * BLOCKS, vectors = 2 * BLOCKS, stride = E + 1;
  const uint first = tile.x * vectors, block = group / parts * 2, part = group % parts;
  const uint at = first_load<F>(part, lane);
  Vectors<2, F> pair;
  pair.stage(x, Normed<W>{norm}, first + block, rows, at, lane);
  UNROLL for (int r = 0; r < 2; r++) {
    const float square = simd_sum(pair.squares[r]);
    if (lane == 0) sums[((block + r) * parts + part) * stride + E] = square;
  }
  for (int from = 0; from < E; from += 8) {
    float products[16];
    UNROLL for (int n = 0; n < 8; n += 2) {
      typename F::Load loads[2][F::loads];
      UNROLL for (int k = 0; k < 2; k++) {
        UNROLL for (int i = 0; i < F::loads; i++)
          weight.read(min(from + n + k, E - 1), at + i * Split<D>::lanes, loads[k][i]);
      }
      UNROLL for (int k = 0; k < 2; k++) dot<2, F>(loads[k], pair, products + n + k, 8);
    }
    const float total = sum16(products, lane);
    const uint n = lane / 2, expert = from + n % 8;
    if (lane % 2 == 0 && expert < uint(E)) sums[((block + n / 8) * parts + part) * stride + expert] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int r = 0; r < 2; r++) {
    const uint row = first + block + r;
    const float scale = inverse_norm<D, parts>(sums + (block + r) * parts * stride + E, stride, eps);
    if (row < rows && lane < uint(Split<D>::lanes)) pair.store(r, y + row * D, scale, at);
  }
  for (uint i = thread_id; i < uint(vectors * E); i += 32 * simds) {
    const uint e = i % E;
    const threadgroup float* own = sums + i / E * parts * stride;
    float total = 0;
    UNROLL for (int g = 0; g < parts; g++) total += own[g * stride + e];
    logits[i] = fma(total, inverse_norm<D, parts>(own + E, stride, eps), float(bias[e]));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint v = group; v < uint(vectors) && first + v < rows; v += simds) {
    uint chosen[CHOSEN];
    float weights[CHOSEN];
    choose<E, CHOSEN>(logits + v * E, lane, chosen, weights);
    if (lane > 0) continue;
    UNROLL for (int k = 0; k < CHOSEN; k++) {
      experts[(first + v) * CHOSEN + k] = chosen[k];
      shares[(first + v) * CHOSEN + k] = weights[k];
    }
  }
}
