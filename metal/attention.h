// Decode attention of the GROUP query heads of one KV head, 64 dims each, over tiles of 32 keys, by one simdgroup.
//
// 8 heads are the 8 rows of a simdgroup matrix. In MLX's documented lane map, lane l holds row r and columns 2j, 2j + 1.
// Scores are computed as keys x heads, so lane (r, j) reads 16 dims of key r: 8j..8j+7 and 32+8j..32+8j+7, two whole
// 16-byte loads. Column c of the d-th matrix therefore stands for dim(d, c) = d/4*32 + c/2*8 + d%4*2 + c%2: the
// contraction may run in any order as long as Q is read in the same one, and the output is stored back through it.
#pragma once
#include <metal_simdgroup_matrix>
#include "simd.h"

METAL_FUNC float2 multiply_add(float2 a, float2 b, float2 c) {
  simdgroup_float8x8 A, B, C;
  reinterpret_cast<thread float2&>(A.thread_elements()) = a;
  reinterpret_cast<thread float2&>(B.thread_elements()) = b;
  reinterpret_cast<thread float2&>(C.thread_elements()) = c;
  simdgroup_multiply_accumulate(C, A, B, C);
  return reinterpret_cast<thread float2&>(C.thread_elements());
}

// The lane that holds matrix row `row` and column pair `pair`.
METAL_FUNC ushort lane_of(uint row, uint pair) {
  return ushort((row & 4) << 2 | (row & 3) << 1 | (pair & 2) << 2 | (pair & 1));
}

// The score of a key that is not seen, and the maximum over none. Not -inf: what the fast exp2 makes of
// infinities is not promised.
constant constexpr float NEVER = -1e30f;

// The running softmax of one simdgroup, scores in log2 units.
template <typename T, int GROUP>
struct Attention {
  uint row, pair;      // of this lane
  float2 q[8], out[8]; // q: dims x heads; out: heads x dims
  float2 top, total;   // of heads 2 * pair, 2 * pair + 1; `total` still to be summed over lanes

  // `heads`: the (GROUP,64) queries. Heads above GROUP are zero: they cost nothing and are never stored.
  METAL_FUNC void begin(const device T* heads, float scale, uint lane) {
    row = ((lane >> 2) & 4) | ((lane >> 1) & 3);
    pair = ((lane >> 2) & 2) | (lane & 1);
    UNROLL for (int d = 0; d < 8; d++) {
      const uint dim = d / 4 * 32 + row / 2 * 8 + d % 4 * 2 + row % 2, head = 2 * pair;
      q[d] = float2(head < GROUP ? float(heads[head * 64 + dim]) : 0.0f,
                    head + 1 < GROUP ? float(heads[(head + 1) * 64 + dim]) : 0.0f) * scale;
      out[d] = 0;
    }
    top = NEVER;
    total = 0;
  }

  // Keys 8i + row of the tile, i < 4: their K and V rows. A key that is not `seen` gets weight 0, but its rows are
  // read, so they must be rows with numbers in them.
  METAL_FUNC void tile(const thread uint* keys, const thread bool* seen, const device T* k, const device T* v) {
    float2 scores[4];
    float2 best = NEVER;
    UNROLL for (int i = 0; i < 4; i++) {
      float x[16];
      load<8>(k + keys[i] * 64 + 8 * pair, x);
      load<8>(k + keys[i] * 64 + 32 + 8 * pair, x + 8);
      float2 score = 0;  // in an array element it would not stay in registers
      UNROLL for (int d = 0; d < 8; d++) score = multiply_add(float2(x[2 * d], x[2 * d + 1]), q[d], score);
      scores[i] = seen[i] ? score : float2(NEVER);
      best = max(best, scores[i]);
    }
    best = max(best, simd_shuffle_xor(best, ushort(2)));
    best = max(best, simd_shuffle_xor(best, ushort(4)));
    best = max(best, simd_shuffle_xor(best, ushort(16)));
    raise(max(top, best));
    UNROLL for (int i = 0; i < 4; i++) {
      float x[16];
      load<8>(v + keys[i] * 64 + 8 * pair, x);
      load<8>(v + keys[i] * 64 + 32 + 8 * pair, x + 8);
      const float2 p = metal::fast::exp2(scores[i] - top);
      total += p;
      // keys x heads to heads x keys: keys 2a and 2a + 1 swap one value, then the pairs move to their lane
      const bool odd = row % 2;
      const float other = simd_shuffle_xor(odd ? p.x : p.y, ushort(2));
      const float2 weights = simd_shuffle(odd ? float2(other, p.y) : float2(p.x, other), lane_of(2 * pair + row % 2, row / 2));
      UNROLL for (int d = 0; d < 8; d++) out[d] = multiply_add(weights, float2(x[2 * d], x[2 * d + 1]), out[d]);
    }
  }

  // Takes a new maximum. Only a tile with a seen key may come here, or its unseen keys would count.
  METAL_FUNC void raise(float2 highest) {
    const float2 factor = metal::fast::exp2(top - highest);
    if (simd_any(highest.x > top.x || highest.y > top.y)) {
      const float2 of_row = simd_shuffle(factor, lane_of(0, row / 2));  // head `row` is column `row`
      const float scale = row % 2 ? of_row.y : of_row.x;
      UNROLL for (int d = 0; d < 8; d++) out[d] *= scale;
    }
    top = highest;
    total *= factor;
  }

  // Leaves this simdgroup's (8,64) sums and (8,2) maxima and totals in threadgroup memory.
  METAL_FUNC void end(threadgroup float* sums, threadgroup float* ends) {
    total += simd_shuffle_xor(total, ushort(2));
    total += simd_shuffle_xor(total, ushort(4));
    total += simd_shuffle_xor(total, ushort(16));
    UNROLL for (int d = 0; d < 8; d++) {
      const uint at = row * 64 + d / 4 * 32 + pair * 8 + d % 4 * 2;
      sums[at] = out[d].x;
      sums[at + 1] = out[d].y;
    }
    if (row == 0) {
      ends[4 * pair] = top.x;
      ends[4 * pair + 1] = total.x;
      ends[4 * pair + 2] = top.y;
      ends[4 * pair + 3] = total.y;
    }
  }
};

// exp2(value - top), and 0 where nothing was seen, also if nothing was seen anywhere.
METAL_FUNC float share(float value, float top) { return value <= NEVER ? 0.0f : metal::fast::exp2(value - top); }
