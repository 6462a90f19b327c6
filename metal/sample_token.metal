// sample_token: the winner of unembed's candidates, its log-probability, and the control row of the next step.
//   token = candidate of the largest score, ties to the lower id;  logprob = logits[token] - log(sum exp(allowed logits))
// Inputs:    best (B,TILES,4) f32 from unembed: score, id, m, sum; logits (B,V) f32; control (B,8) i32
// Output:    token (B,) i32; logprob (B,) f32, of temperature 1; next (B,8) i32: control with position + 1, slot + 1
// Grid:      B threadgroups of 8 simdgroups: 3142 candidates are 13 loads of 16 bytes a thread.
// Numerics:  float32; the token is an exact comparison of unembed's scores.
// Requires:  a token that may be chosen; checked in kernels.sample_token as far as shapes go.
// Used when: a decode step ends, and no row has a top-k, top-p or min-p; else sample_filtered.
// Not fused: with unembed, which has no last threadgroup.
// Source:    our own.
#include "simd.h"

struct Best {
  float score, high, total;
  uint id;
};

METAL_FUNC Best join(Best a, Best b) {
  Best out;
  const bool second = b.score > a.score || (b.score == a.score && b.id < a.id);
  out.score = second ? b.score : a.score;
  out.id = second ? b.id : a.id;
  out.high = max(a.high, b.high);
  out.total = (a.high == -INFINITY ? 0.0f : a.total * metal::exp(a.high - out.high)) +
              (b.high == -INFINITY ? 0.0f : b.total * metal::exp(b.high - out.high));
  return out;
}

template <int V, int TILES, typename Tokens, typename Probs>
METAL_FUNC void sample_token(
    const device float* best, const device float* logits, const device int* control, Tokens token, Probs logprob,
    device int* next, threadgroup float* shared, uint3 tile, uint thread_id, uint lane, uint group) {
  const uint b = tile.x;
  Best mine = {-INFINITY, -INFINITY, 0.0f, uint(V)};
  for (uint i = thread_id; i < TILES; i += 256) {
    const float4 from = ((const device float4*)best)[ulong(b) * TILES + i];
    const Best other = {from.x, from.z, from.w, uint(from.y)};
    mine = join(mine, other);
  }
  UNROLL for (ushort step = 16; step > 0; step /= 2) {
    const Best other = {simd_shuffle_xor(mine.score, step), simd_shuffle_xor(mine.high, step),
                        simd_shuffle_xor(mine.total, step), simd_shuffle_xor(mine.id, step)};
    mine = join(mine, other);
  }
  if (lane == 0) {
    shared[group * 4] = mine.score;
    shared[group * 4 + 1] = mine.high;
    shared[group * 4 + 2] = mine.total;
    shared[group * 4 + 3] = float(mine.id);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id < 8) next[b * 8 + thread_id] = control[b * 8 + thread_id] + (thread_id == 0 || thread_id == 2);
  if (thread_id > 0) return;
  for (uint g = 1; g < 8; g++) {
    const Best other = {shared[g * 4], shared[g * 4 + 1], shared[g * 4 + 2], uint(shared[g * 4 + 3])};
    mine = join(mine, other);
  }
  const uint id = min(mine.id, uint(V - 1));  // logits that are no numbers
  token[b] = int(id);
  logprob[b] = logits[ulong(b) * V + id] - mine.high - metal::log(mine.total);
}
