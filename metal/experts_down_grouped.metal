// experts_down_grouped: the products of experts_down for a batch, each expert's codes read once for up to 4 of its rows.
//   sums[p,i,j] = share[p] * W[e,j,:] . h[p,:] over the i-th simdgroup's columns, for the pairs p of a block
// Inputs:    h (B,CHOSEN,H) T; blocks (M,8) i32 and choice (B,CHOSEN,2) f32 of expert_groups; weight and scales as in
//            experts_down
// Output:    sums (B,CHOSEN,PARTS,N) f32, added up by experts_sum
// Grid:      N/16 x M threadgroups of 16 rows and 1 to 4 vectors: 2 x 3 simdgroups, 2 vectors each, for each third of the
//            columns: 192 threads that read the codes together, no barrier; those of empty blocks end at once.
//            4 vectors a simdgroup took 210 registers: compilers keep them as floats.
// Numerics:  as experts_down, and the same bits: thirds stay apart because it adds them in its own order.
// Requires:  as experts_down; checked in kernels.experts_down_grouped.
// Used when: a batch is so large that its rows share experts, see kernels/batches.py.
// Not fused: the sum over a row's experts, which are in several threadgroups.
// Source:    our own; decode of the codes as in experts_swiglu.
#include "mxfp4.h"

template <int H, int N, typename T>
METAL_FUNC void experts_down_grouped(
    const device T* h, const device int* blocks, const device float* choice, const device uint* weight,
    const device uchar* scales, device float* sums, uint3 tile, uint lane, uint group) {
  constexpr uint width = H / 32, parts = (width + 31) / 32, lanes = width / parts;
  const device int* own = blocks + tile.y * 8;
  const uint expert = own[0], count = own[1], row = tile.x * 16, part = group % parts, pair = group / parts * 2;
  if (pair >= count) return;
  const uint block = part * lanes + min(lane, lanes - 1);
  typename Pair<T>::type values[2][16];
  float factors[2];
  UNROLL for (int r = 0; r < 2; r++) {
    const uint from = own[2 + pair + r];
    stage_block(h + from * H + block * 32, values[r]);
    factors[r] = lane < lanes ? DECODE_SCALE * choice[2 * from + 1] : 0.0f;
  }
  const uint at = (expert * N + row) * width + block;
  const device uint4* codes = (const device uint4*)weight + at;
  float2 totals;  // of rows 2 * (lane / 2 % 8) and the next, of vector lane / 16
  UNROLL for (uint odd = 0; odd < 2; odd++) {
    float partial[16];
    UNROLL for (uint first = 0; first < 8; first += 4) {
      uint4 read[4];
      float exponents[4];
      UNROLL for (uint i = 0; i < 4; i++) {
        const uint next = (2 * (first + i) + odd) * width;
        read[i] = codes[next];
        exponents[i] = block_scale(scales[at + next]);
      }
      UNROLL for (uint i = 0; i < 4; i++) {
        float products[2];
        dot_block<2>(read[i], values, products);
        UNROLL for (uint r = 0; r < 2; r++) partial[8 * r + first + i] = products[r] * (exponents[i] * factors[r]);
      }
    }
    totals[odd] = sum16(partial, lane);
  }
  const uint vector = pair + lane / 16;
  if (lane % 2 > 0 || vector >= count) return;
  device float* out = sums + (uint(own[2 + vector]) * parts + part) * N + row;
  ((device float2*)out)[lane / 2 % 8] = totals;
}
