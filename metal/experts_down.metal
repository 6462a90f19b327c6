// experts_down: the chosen experts' down projections with bias, summed by router weight, added to the residual.
//   y[b,j] = residual[b,j] + sum_k w[k] * (W[e_k,j,:] . h[b,k,:] + bias[e_k,j]),  e, w = top-k of logits[b,:]
// Inputs:    h (B,CHOSEN,H) T; logits (B,E) f32; weight (E,N,H/8) u32 MXFP4; scales (E,N,H/32) u8; bias (E,N) W;
//            residual (B,N) T
// Output:    y (B,N) T
// Grid:      N/16 x B threadgroups of 16 rows; one simdgroup for each expert and third of the columns: 12 x 32 threads.
//            All 4 experts end in one group, so one barrier finishes the layer without atomics; fewer rows
//            would re-read h more often, more would leave cores idle (180 groups for 80 cores).
// Numerics:  float32 sums, router weight folded into the block scales, one rounding at the store; bfloat and half h
//            are held as halves.
// Requires:  |h| < 65504 unless T is float (the clamps bound it by 57); N % 16 == 0; H % 32 == 0 in whole simdgroups;
//            CHOSEN * simdgroups <= 32; checked in kernels.experts_down.
// Used when: few tokens are decoded; for chunks mx.gather_qmm on sorted experts reads each expert once.
// Not fused: the next layer's norm; it needs the whole of y.
// Source:    our own; decode of the codes as in experts_swiglu.
#include "choose.h"
#include "mxfp4.h"

template <int H, int N, int E, int CHOSEN, typename T, typename W>
METAL_FUNC void experts_down(
    const device T* h, const device float* logits, const device uint* weight, const device uchar* scales,
    const device W* bias, const device T* residual, device T* y, threadgroup float* sums, uint3 tile,
    uint thread_id, uint lane, uint group) {
  constexpr uint blocks = H / 32, parts = (blocks + 31) / 32, lanes = blocks / parts;
  const uint b = tile.y, row = tile.x * 16, chosen = group / parts;
  const uint block = group % parts * lanes + min(lane, lanes - 1);
  typename Pair<T>::type values[16];
  stage_block(h + (b * CHOSEN + chosen) * H + block * 32, values);
  uint experts[CHOSEN];
  float weights[CHOSEN];
  choose<E, CHOSEN>(logits + b * E, lane, experts, weights);
  uint expert = experts[0];
  float share = weights[0];
  UNROLL for (int k = 1; k < CHOSEN; k++) {
    expert = chosen == uint(k) ? experts[k] : expert;
    share = chosen == uint(k) ? weights[k] : share;
  }
  const uint at = (expert * N + row) * blocks + block;
  const device uint4* codes = (const device uint4*)weight + at;
  const float scale = lane < lanes ? DECODE_SCALE * share : 0.0f;
  float partial[16];
  UNROLL for (uint first = 0; first < 16; first += 4) {  // four rows in flight
    uint4 read[4];
    float exponents[4];
    UNROLL for (uint i = 0; i < 4; i++) {
      read[i] = codes[(first + i) * blocks];
      exponents[i] = block_scale(scales[at + (first + i) * blocks]);
    }
    UNROLL for (uint i = 0; i < 4; i++) partial[first + i] = dot_block(read[i], values) * (exponents[i] * scale);
  }
  const float total = sum16(partial, lane);
  if (lane % 2 == 0) sums[group * 16 + lane / 2] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id >= 16) return;
  const uint out = row + thread_id;
  float result = float(residual[b * N + out]);
  UNROLL for (int k = 0; k < CHOSEN; k++) result = fma(weights[k], float(bias[experts[k] * N + out]), result);
  UNROLL for (uint i = 0; i < CHOSEN * parts; i++) result += sums[i * 16 + thread_id];
  y[b * N + out] = T(result);
}
