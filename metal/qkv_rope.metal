// qkv_rope: bias of a chunk's queries, keys and values, YaRN RoPE of queries and keys, heads before tokens.
//   q, k, v = product + bias;  q, k turned by position * frequency in pairs (d, d + 32)
// Inputs:    q (B,TQ,HQ*64), of the last TQ tokens; k and v (B,TOKENS,HKV*64) T; biases (heads*64,) W; cosines and sines
//            (ROWS,1,TOKENS,32) f32, of each row or one for all
// Output:    rotated q (B,HQ,TQ,64); k and v (B,HKV,TOKENS,64) T
// Grid:      a thread for 8 pairs of a head, 4 for a head: 256 threads read consecutive heads of one token.
// Numerics:  float32, one rounding at the store.
// Requires:  head dim 64; TQ <= TOKENS; checked in kernels.qkv_rope.
// Used when: MLX's products of a chunk are done.
// Not fused: the projections, which are MLX's; the ring's copy (extend_ring), which full layers do not need.
// Source:    our own.
#include "simd.h"

template <int HQ, int HKV, typename T, typename W>
METAL_FUNC void qkv_rope(
    const device T* q, const device T* k, const device T* v, const device W* bq, const device W* bk, const device W* bv,
    const device float* cosines, const device float* sines, device T* new_q, device T* new_k, device T* new_v,
    uint queries, uint tokens, uint rows, uint3 tile, uint thread_id, uint threads) {
  const uint head = (tile.x * threads + thread_id) / 4, d = thread_id % 4 * 8, b = tile.z, before = tokens - queries;
  const bool is_q = head < uint(HQ), is_v = head >= uint(HQ + HKV);
  if (head >= uint(HQ + 2 * HKV) || (is_q && tile.y < before)) return;
  const uint local = is_q ? head : is_v ? head - HQ - HKV : head - HQ, heads = is_q ? HQ : HKV;
  const uint count = is_q ? queries : tokens, token = is_q ? tile.y - before : tile.y;
  const device T* from = (is_q ? q : is_v ? v : k) + (ulong(b * count + token) * heads + local) * 64 + d;
  const device W* bias = (is_q ? bq : is_v ? bv : bk) + local * 64 + d;
  device T* to = (is_q ? new_q : is_v ? new_v : new_k) + (ulong(b * heads + local) * count + token) * 64 + d;
  float first[8], second[8], added[8], cosine[8], sine[8];
  load<8>(from, first);
  load<8>(from + 32, second);
  load<8>(bias, added);
  UNROLL for (int i = 0; i < 8; i++) first[i] += added[i];
  load<8>(bias + 32, added);
  UNROLL for (int i = 0; i < 8; i++) second[i] += added[i];
  if (!is_v) {
    const ulong angle = ulong(min(b, rows - 1) * tokens + tile.y) * 32 + d;
    load<8>(cosines + angle, cosine);
    load<8>(sines + angle, sine);
    UNROLL for (int i = 0; i < 8; i++) {
      const float turned = first[i];
      first[i] = turned * cosine[i] - second[i] * sine[i];
      second[i] = second[i] * cosine[i] + turned * sine[i];
    }
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    store4(to + i, first[i], first[i + 1], first[i + 2], first[i + 3]);
    store4(to + 32 + i, second[i], second[i + 1], second[i + 2], second[i + 3]);
  }
}
