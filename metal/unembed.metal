// unembed: the final norm, the logits of the whole vocabulary, and each threadgroup's candidate for the next token.
//   y = x / sqrt(mean(x^2) + eps) * norm;  logits[v] = W[v,:] . y
//   candidate: the allowed v of largest logits[v] / temperature + gumbel(seed, position + 1, v), without noise at 0
// Inputs:    x (B,D) T; norm (D,) W; weight (V,D) in format F; allowed (V,) u8; control (B,8) i32: position, base, slot,
//            seed low, seed high; temperature (B,8) f32, in column 0, 0 is greedy
// Output:    logits (B,V) f32; best (B,V/64,4) f32: score, id, and over the allowed logits m = max, sum exp(logit - m)
// Grid:      V/64 x B threadgroups of 64 rows in 4 rounds, one simdgroup for each third of D (matvec.h): 96 threads,
//            3142 groups; 64 rows so that a group's one read of x and norm is 2% of its weights.
// Numerics:  float32 throughout; ids are exact in float32 (V < 2^24). The noise is sampling.gumbel's, bit for bit up to log.
// Requires:  V % 64 == 0, V < 2^24; D fills whole simdgroups (matvec.h); checked in kernels.unembed.
// Used when: a decode step ends.
// Not fused: the choice between threadgroups (sample_token); MLX has no ordering between groups of one dispatch.
// Source:    our own; hash "lowbias32" of Chris Wellons (public domain), as in sampling.py.
#include "matvec.h"

METAL_FUNC uint mix(uint x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

METAL_FUNC float gumbel(uint low, uint high, uint position, uint id) {
  low = mix(low + 0x9E3779B9u);
  const uint a = mix(low ^ position), b = mix(mix(high ^ low) + a);
  const uint bits = mix(mix(id + a) ^ b);
  const float w = min((float(bits) + 0.5f) * 2.3283064365386963e-10f, 0.99999994f), rest = 1.0f - w;
  // w = bits / 2^32, below 1; -log(1 - w), exact for small w too: the rounding of `rest` cancels in the ratio (Goldberg 1991, theorem 4)
  const float exponential = rest == 1.0f ? w : -metal::log(rest) * (w / (1.0f - rest));
  return -metal::log(exponential);
}

template <int D, int V, typename F, typename T, typename W>
METAL_FUNC void unembed(
    const device T* x, const device W* norm, F weight, const device uchar* allowed, const device int* control,
    const device float* temperature, device float* logits, device float* best, threadgroup float* sums, float eps,
    uint3 tile, uint lane, uint group) {
  constexpr int groups = Split<D>::groups;
  const uint at = first_load<F>(group, lane), b = tile.y;
  Lane<F> values;
  const float squares = simd_sum(stage_normed<F>(x + b * D, norm, at, lane, values));
  if (lane == 0) sums[64 * groups + group] = squares;
  for (uint first = 0; first < 64; first += 16) {
    const float total = dot16<8>(weight, tile.x * 64 + first, at, lane, values);
    if (lane % 2 == 0) sums[group * 64 + first + lane / 2] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (group > 0) return;
  float square = 0;
  UNROLL for (int g = 0; g < groups; g++) square += sums[64 * groups + g];
  const float scale = metal::rsqrt(square / D + eps), divisor = temperature[b * 8];
  float score = -INFINITY, own[2];
  uint id = V;
  UNROLL for (int i = 0; i < 2; i++) {
    const uint row = lane + 32 * i, v = tile.x * 64 + row;
    float logit = 0;
    UNROLL for (int g = 0; g < groups; g++) logit += sums[g * 64 + row];
    logit *= scale;
    logits[ulong(b) * V + v] = logit;
    own[i] = allowed[v] ? logit : -INFINITY;
    float candidate = own[i];
    if (divisor > 0 && allowed[v])
      candidate = logit / max(divisor, 1e-6f) +
                  gumbel(uint(control[b * 8 + 3]), uint(control[b * 8 + 4]), uint(control[b * 8]) + 1, v);
    id = candidate > score ? v : id;
    score = max(score, candidate);
  }
  const float top = simd_max(score), high = simd_max(max(own[0], own[1]));
  id = simd_min(score == top ? id : uint(V));
  float total = 0;
  UNROLL for (int i = 0; i < 2; i++) total += own[i] == -INFINITY ? 0.0f : metal::exp(own[i] - high);
  total = simd_sum(total);
  if (lane == 0) {
    device float* out = best + (ulong(b) * (V / 64) + tile.x) * 4;
    out[0] = top;
    out[1] = float(id);
    out[2] = high;
    out[3] = total;
  }
}
