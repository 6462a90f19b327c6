// unembed: the final norm, the logits of the whole vocabulary, and each threadgroup's candidate for the next token.
//   y = x / sqrt(mean(x^2) + eps) * norm;  logits[v] = W[v,:] . y
//   candidate: the allowed v of largest logits[v] / temperature + gumbel(seed, position + 1, v), without noise at 0
// Inputs:    x (B,D) T; norm (D,) W; weight (V,D) in format F; allowed (B,V/32) u32: v is bit v % 32 of word v / 32;
//            control (B,8) i32: position, base, slot, seed low, seed high; temperature (B,8) f32, in column 0, 0 is greedy
// Output:    logits (B,V) f32; best (B,V/64,4) f32: score, id, and over the allowed logits m = max, sum exp(logit - m)
// Grid:      V/64 threadgroups of 64 rows in 4 rounds, one simdgroup for each third of D (matvec.h): 96 threads,
//            3142 groups; 64 rows so that a group's one read of x and norm is 2% of its weights. In a batch R = 2 vectors
//            a simdgroup and up to 8 such blocks a threadgroup, TILES = 2 times 64 rows where V allows it, as in
//            norm_qkv_rope; deep enough for B.
// Numerics:  float32 throughout; ids are exact in float32 (V < 2^24). The noise is sampling.gumbel's (gumbel.h).
// Requires:  V % 64 == 0, 256 <= V < 2^24; D fills whole simdgroups (matvec.h); checked in kernels.unembed.
// Used when: a decode step ends.
// Not fused: the choice between threadgroups (sample_token); MLX has no ordering between groups of one dispatch.
// Source:    our own.
#include "gumbel.h"
#include "matvec.h"

// 64 logits of a vector in this threadgroup, and its candidate among them, by one simdgroup. A part's sums are `stride`
// apart, the last of them the sum of squares.
template <int D, int V, int groups, int stride>
METAL_FUNC void finish(
    const threadgroup float* sums, const threadgroup float* squares, const device uint* allowed,
    const device int* control, float divisor, device float* logits, device float* best, float eps, uint tile, uint lane) {
  float square = 0;
  UNROLL for (int g = 0; g < groups; g++) square += squares[g * stride];
  const float scale = metal::rsqrt(square / D + eps);
  float score = -INFINITY, own[2];
  uint id = V;
  UNROLL for (int i = 0; i < 2; i++) {
    const uint row = lane + 32 * i, v = tile * 64 + row;
    float logit = 0;
    UNROLL for (int g = 0; g < groups; g++) logit += sums[g * stride + row];
    logit *= scale;
    logits[v] = logit;
    const bool may = allowed[tile * 2 + i] >> lane & 1;
    own[i] = may ? logit : -INFINITY;
    const float candidate = may ? score_of(logit, divisor, control, v) : -INFINITY;
    id = candidate > score ? v : id;
    score = max(score, candidate);
  }
  const float top = simd_max(score), high = simd_max(max(own[0], own[1]));
  id = simd_min(score == top ? id : uint(V));
  float total = 0;
  UNROLL for (int i = 0; i < 2; i++) total += own[i] == -INFINITY ? 0.0f : metal::exp(own[i] - high);
  total = simd_sum(total);
  if (lane == 0) {
    device float* out = best + tile * 4;
    out[0] = top;
    out[1] = float(id);
    out[2] = high;
    out[3] = total;
  }
}

template <int D, int V, int R, int BLOCKS, int PARTS, int TILES, typename F, typename T, typename W>
METAL_FUNC void unembed(
    const device T* x, const device W* norm, F weight, const device uint* allowed, const device int* control,
    const device float* temperature, device float* logits, device float* best, threadgroup float* sums, float eps,
    uint batch, uint3 tile, uint lane, uint group) {
  constexpr int groups = Split<D>::groups, ways = groups / PARTS, vectors = R * BLOCKS, stride = 64 * TILES + 1;
  const uint first = tile.y * vectors, block = group / ways * R;
  for (int i = 0; i < PARTS; i++) {
    const uint part = group % ways * PARTS + i, at = first_load<F>(part, lane);
    threadgroup float* own = sums + (block * groups + part) * stride;
    Vectors<R, F> values;
    values.stage(x, Normed<W>{norm}, first + block, batch, at, lane);
    UNROLL for (int r = 0; r < R; r++) {
      const float square = simd_sum(values.squares[r]);
      if (lane == 0) own[r * groups * stride + 64 * TILES] = square;
    }
    for (uint row = 0; row < 64 * TILES; row += 16)
      dot16<8>(weight, tile.x * 64 * TILES + row, at, lane, values, own + row, groups * stride);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = group; i < uint(vectors * TILES); i += ways * BLOCKS) {
    const uint vector = i / TILES, n = i % TILES, b = first + vector;
    const threadgroup float* own = sums + vector * groups * stride;
    if (R == 1 || b < batch)
      finish<D, V, groups, stride>(own + 64 * n, own + 64 * TILES, allowed + b * (V / 32), control + b * 8, temperature[b * 8],
                                   logits + ulong(b) * V, best + ulong(b) * (V / 64) * 4, eps, tile.x * TILES + n, lane);
  }
}
