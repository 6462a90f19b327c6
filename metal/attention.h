// Attention of one token: the GROUP query heads of one KV head, 64 dims each, over tiles of 32 keys, by one simdgroup.
//
// 8 heads are the 8 rows of a simdgroup matrix. In MLX's documented lane map, lane l holds row r and columns 2j, 2j + 1.
// Scores are computed as keys x heads, so lane (r, j) reads 16 dims of key r: 8j..8j+7 and 32+8j..32+8j+7, two whole
// 16-byte loads. Column c of the d-th matrix therefore stands for dim(d, c) = d/4*32 + c/2*8 + d%4*2 + c%2: the
// contraction may run in any order as long as Q is read in the same one. Sums are dims x heads, so that the weights are
// used as they come: of V, lane (r, j) reads dims 8r..8r+7 of keys 2j and 2j + 1, and row r of the d-th matrix is dim 8r+d.
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

// The 8x8 tile of which this lane holds two values, rows for columns: rows 2a and 2a + 1 swap one value, then the pairs
// move to their lane.
METAL_FUNC float2 transpose(float2 values, uint row, uint pair) {
  const bool odd = row % 2;
  const float other = simd_shuffle_xor(odd ? values.x : values.y, ushort(2));
  return simd_shuffle(odd ? float2(other, values.y) : float2(values.x, other), lane_of(2 * pair + row % 2, row / 2));
}

// The score of a key that is not seen, and the maximum over none. Not -inf: what the fast exp2 makes of
// infinities is not promised.
constant constexpr float NEVER = -1e30f;

// The running softmax of one simdgroup, scores in log2 units.
template <typename T, int GROUP>
struct Attention {
  uint row, pair;      // of this lane
  float2 q[8], out[8]; // dims x heads
  float2 top, total;   // of heads 2 * pair, 2 * pair + 1; `total` still to be summed over lanes

  // `heads`: the GROUP queries of 64, `stride` apart. Heads above GROUP are zero: they are never stored.
  METAL_FUNC void begin(const device T* heads, uint stride, float scale, uint lane) {
    row = ((lane >> 2) & 4) | ((lane >> 1) & 3);
    pair = ((lane >> 2) & 2) | (lane & 1);
    float x[16];
    load_row(heads + ulong(min(row, uint(GROUP - 1))) * stride + 8 * pair, x);
    const float factor = row < GROUP ? scale : 0.0f;
    UNROLL for (int d = 0; d < 8; d++) {
      q[d] = transpose(float2(x[2 * d], x[2 * d + 1]) * factor, row, pair);
      out[d] = 0;
    }
    top = NEVER;
    total = 0;
  }

  // The rows 0..31 of k and v. A key that is not `seen` gets weight 0, but a row is read for it, none above `end`: those
  // below must be rows with numbers in them.
  METAL_FUNC void tile(const thread bool* seen, uint end, const device T* k, const device T* v) {
    float2 scores[4], best = top;
    UNROLL for (int i = 0; i < 4; i++) {
      float x[16];
      load_row(k + min((8 * i + row) * 64 + 8 * pair, end * 64 + 8 * pair), x);
      scores[i] = score(x, seen[i]);
      best = max(best, scores[i]);
    }
    raise(best);
    UNROLL for (int i = 0; i < 4; i++) {
      float x[2][8];
      UNROLL for (int c = 0; c < 2; c++) load<8>(v + min((8 * i + 2 * pair + c) * 64 + 8 * row, end * 64 + 8 * row), x[c]);
      add(scores[i], x);
    }
  }

  // Of a row of 64, this lane's 16 dims, which begin at `from`.
  METAL_FUNC void load_row(const device T* from, thread float* x) {
    load<8>(from, x);
    load<8>(from + 32, x + 8);
  }

  // Of 8 keys, whose rows the lanes hold in x. Next to NEVER the products vanish.
  METAL_FUNC float2 score(const thread float* x, bool seen) {
    float2 sum = seen ? 0.0f : NEVER;  // in an array element it would not stay in registers
    UNROLL for (int d = 0; d < 8; d++) sum = multiply_add(float2(x[2 * d], x[2 * d + 1]), q[d], sum);
    return sum;
  }

  // Takes `top` or this lane's highest score, if that is higher, before its keys are added. If the maximum stays at
  // NEVER, unseen keys would count.
  METAL_FUNC void raise(float2 best) {
    best = max(best, simd_shuffle_xor(best, ushort(2)));
    best = max(best, simd_shuffle_xor(best, ushort(4)));
    best = max(best, simd_shuffle_xor(best, ushort(16)));
    const float2 factor = metal::fast::exp2(top - best);
    UNROLL for (int d = 0; d < 8; d++) out[d] *= factor;
    total *= factor;
    top = best;
  }

  // Adds 8 keys: their scores, and in x the values of keys 2 * pair and 2 * pair + 1.
  METAL_FUNC void add(float2 scores, const thread float (*x)[8]) {
    const float2 weights = metal::fast::exp2(scores - top);
    total += weights;
    UNROLL for (int d = 0; d < 8; d++) out[d] = multiply_add(float2(x[0][d], x[1][d]), weights, out[d]);
  }

  METAL_FUNC void add_totals() {
    total += simd_shuffle_xor(total, ushort(2));
    total += simd_shuffle_xor(total, ushort(4));
    total += simd_shuffle_xor(total, ushort(16));
  }

  // Leaves this simdgroup's (8,64) sums and (8,2) maxima and totals in threadgroup memory.
  METAL_FUNC void end(threadgroup float* sums, threadgroup float* ends) {
    add_totals();
    UNROLL for (int d = 0; d < 8; d++) {
      const uint at = pair * 128 + row * 8 + d;
      sums[at] = out[d].x;
      sums[at + 64] = out[d].y;
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
