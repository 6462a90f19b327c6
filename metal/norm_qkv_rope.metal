// norm_qkv_rope: RMS norm, the Q, K and V projections with bias, YaRN RoPE, and the append of K and V.
//   y = x / sqrt(mean(x^2) + eps) * norm;  q, k, v = W y + bias;  q, k turned by position * frequency in pairs (d, d + 32)
// Inputs:    x (B,D) T; norm (D,) W; q/k/v weights (heads*64, D) in format F; biases (heads*64,) W;
//            coarse (C/128,2,32) f32 and fine (128,2,32) f32: cos and sin at multiples of 128 and between them;
//            control (B,8) i32: position, base, slot; keys and values (B,HKV,ROWS,64) T
// Output:    q (B,HQ,64) T; new_keys and new_values (B,HKV,ROWS,64) T: rows below slot copied, row slot new, rows
//            above undefined
// Grid:      (HQ + 2*HKV)*4 threadgroups of 16 rows, 8 pairs (d, d+32), then 2*HKV that copy one plane each.
//            A threadgroup has one simdgroup for each third of D (matvec.h): small groups retire smoothly. In a batch a
//            simdgroup has R = 2 vectors and a threadgroup up to 8 such blocks, 16 rows that read a weight together:
//            12 simdgroups of 128 registers a thread are what a core holds, so from 5 blocks on a simdgroup walks
//            PARTS = 3 thirds. From 3 vectors on TILES = 2: 32 rows of weights for a read of x, and 160 threadgroups
//            of 5 to 12 simdgroups for 320 of 3: 80 cores still have two each. Deep enough for B.
// Numerics:  float32 throughout, one rounding at the store; the norm's factor multiplies the finished sum. Angles are
//            joined from two tables of float64 origin, so position 131,071 is as exact as position 1.
// Requires:  D % 32 == 0 and whole simdgroups (matvec.h); slot < ROWS; checked in kernels.norm_qkv_rope.
// Used when: one token a row is decoded.
// Not fused: the attention; it needs every head's q and k.
// Source:    our own; fusing rope and the K,V write after gpt-oss metal/source (Apache-2.0), see NOTICE.
#include "matvec.h"

template <
    int D, int HQ, int HKV, int ROWS, int R, int BLOCKS, int PARTS, int TILES, typename F, typename T, typename W, typename C>
METAL_FUNC void norm_qkv_rope(
    const device T* x, const device W* norm, F wq, F wk, F wv, const device W* bq, const device W* bk,
    const device W* bv, const device float* coarse, const device float* fine, const device C* control,
    const device T* keys, const device T* values, device T* q, device T* new_keys, device T* new_values,
    threadgroup float* sums, float eps, uint batch, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr int groups = Split<D>::groups, ways = groups / PARTS, threads = 32 * ways * BLOCKS, heads = HQ + 2 * HKV;
  constexpr int vectors = R * BLOCKS, pairs = 8 * TILES, tiles = 32 / pairs, stride = 2 * pairs + 1;
  const uint from = tile.y * vectors;
  if (tile.x >= uint(tiles * heads)) {
    const uint plane = tile.x - tiles * heads;
    for (uint b = from; b < (R == 1 ? from + 1 : min(from + vectors, batch)); b++) {
      const uint start = (b * HKV + plane % HKV) * ROWS * 64, slot = min(uint(control[b * 8 + 2]), uint(ROWS));
      const device uint4* old = (const device uint4*)((plane < HKV ? keys : values) + start);
      device uint4* to = (device uint4*)((plane < HKV ? new_keys : new_values) + start);
      for (uint i = thread_id; i < slot * 64 * sizeof(T) / 16; i += threads) to[i] = old[i];
    }
    return;
  }
  const uint head = tile.x / tiles, low = tile.x % tiles * pairs, block = group / ways * R;
  const bool is_q = head < HQ, is_v = head >= HQ + HKV;
  const uint local = is_q ? head : is_v ? head - HQ - HKV : head - HQ;
  const F weight = is_q ? wq : is_v ? wv : wk;
  for (int i = 0; i < PARTS; i++) {
    const uint part = group % ways * PARTS + i, at = first_load<F>(part, lane);
    threadgroup float* own = sums + (block * groups + part) * stride;
    Vectors<R, F> vector;
    vector.stage(x, Normed<W>{norm}, from + block, batch, at, lane);
    UNROLL for (int r = 0; r < R; r++) {
      const float square = simd_sum(vector.squares[r]);
      if (lane == 0) own[r * groups * stride + 2 * pairs] = square;
    }
    for (int n = 0; n < TILES; n++)
      dot16<32>(weight, local * 64 + low + 8 * n, at, lane, vector, own + 16 * n, groups * stride);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const device W* bias = is_q ? bq : is_v ? bv : bk;
  for (uint i = thread_id; i < pairs * vectors; i += threads) {
    const uint own = i / pairs, pair = i % pairs, place = pair / 8 * 16 + pair % 8, b = from + own;
    if (R > 1 && b >= batch) return;
    float square = 0, first = 0, second = 0;
    UNROLL for (int g = 0; g < groups; g++) {
      const threadgroup float* sum = sums + (own * groups + g) * stride;
      square += sum[2 * pairs];
      first += sum[place];
      second += sum[8 + place];
    }
    const float scale = metal::rsqrt(square / D + eps);
    const uint d = low + pair, slot = min(uint(control[b * 8 + 2]), uint(ROWS));
    first = fma(first, scale, float(bias[local * 64 + d]));
    second = fma(second, scale, float(bias[local * 64 + d + 32]));
    if (!is_v) {
      const uint position = control[b * 8];
      const device float* far = coarse + position / 128 * 64 + d;
      const device float* near = fine + position % 128 * 64 + d;
      const float cosine = far[0] * near[0] - far[32] * near[32], sine = far[32] * near[0] + far[0] * near[32];
      const float turned = first;
      first = turned * cosine - second * sine;
      second = second * cosine + turned * sine;
    }
    if (is_q) {
      q[(b * HQ + head) * 64 + d] = T(first);
      q[(b * HQ + head) * 64 + d + 32] = T(second);
    } else if (slot < uint(ROWS)) {
      device T* row = (is_v ? new_values : new_keys) + ((b * HKV + local) * ROWS + slot) * 64;
      row[d] = T(first);
      row[d + 32] = T(second);
    }
  }
}
