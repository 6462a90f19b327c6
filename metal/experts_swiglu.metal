// experts_swiglu: the chosen experts' gate and up projections with bias, then the clamped SwiGLU.
//   g = min(Wg[e,j,:] . x + bg[e,j], 7);  u = clamp(Wu[e,j,:] . x + bu[e,j], -7, 7)
//   h[b,k,j] = g * sigmoid(1.702 g) * (u + 1),  e = k-th largest of logits[b,:]
// Inputs:    x (B,D) T; logits (B,E) f32; gate and up: weight (E,H,D/8) u32 MXFP4, low nibble first,
//            scales (E,H,D/32) u8, bias (E,H) W
// Output:    h (B,CHOSEN,H) T
// Grid:      H/16 x CHOSEN x B threadgroups of 16 gate/up pairs. A lane owns one block of 32 columns and keeps its
//            x values in registers; one simdgroup for each third of the 90 blocks: 96 threads. 720 such groups
//            are 27 simdgroups a core on 80 cores; 16 rows of scales are 45 whole sectors. 384 B threadgroup memory.
// Numerics:  float32 sums, one rounding at the store; bfloat and half x are held as halves.
// Requires:  |x| < 65504 unless T is float (norm weights bound it, see kernels.experts_swiglu); H % 16 == 0;
//            D % 32 == 0 in whole simdgroups; checked in kernels.experts_swiglu.
// Used when: few tokens are decoded; for chunks mx.gather_qmm on sorted experts reads each expert once.
// Not fused: the down projection; each of its rows needs the whole of h.
// Source:    our own; the byte-parallel decode of the codes after gpt-oss metal/source/moematmul.metal:53-82
//            (Apache-2.0), see NOTICE.
#include "choose.h"
#include "mxfp4.h"
#include "swiglu.h"

template <int D, int H, int E, int CHOSEN, typename T, typename W>
METAL_FUNC void experts_swiglu(
    const device T* x, const device float* logits, const device uint* gate_weight, const device uchar* gate_scales,
    const device W* gate_bias, const device uint* up_weight, const device uchar* up_scales, const device W* up_bias,
    device T* h, threadgroup float* sums, float alpha, float limit, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr uint blocks = D / 32, groups = (blocks + 31) / 32, lanes = blocks / groups;
  const uint b = tile.z, row = tile.x * 16, block = group * lanes + min(lane, lanes - 1);
  typename Pair<T>::type values[16];
  stage_block(x + b * D + block * 32, values);
  uint experts[CHOSEN];
  float weights[CHOSEN];
  choose<E, CHOSEN>(logits + b * E, lane, experts, weights);
  uint expert = experts[0];
  UNROLL for (int k = 1; k < CHOSEN; k++) expert = tile.y == uint(k) ? experts[k] : expert;
  const uint at = (expert * H + row) * blocks + block;
  const device uint4* gate = (const device uint4*)gate_weight + at;
  const device uint4* up = (const device uint4*)up_weight + at;
  const float scale = lane < lanes ? DECODE_SCALE : 0.0f;
  for (uint first = 0; first < 16; first += 8) {
    float partial[16];
    UNROLL for (uint pair = 0; pair < 8; pair += 2) {  // two rows in flight: 4 loads of 16 bytes a lane
      uint4 codes[4];
      float exponents[4];
      UNROLL for (uint i = 0; i < 2; i++) {
        const uint next = (first + pair + i) * blocks;
        codes[i] = gate[next];
        codes[2 + i] = up[next];
        exponents[i] = block_scale(gate_scales[at + next]);
        exponents[2 + i] = block_scale(up_scales[at + next]);
      }
      UNROLL for (uint i = 0; i < 2; i++) {
        partial[pair + i] = dot_block(codes[i], values) * (exponents[i] * scale);
        partial[8 + pair + i] = dot_block(codes[2 + i], values) * (exponents[2 + i] * scale);
      }
    }
    const float total = sum16(partial, lane);
    const uint sum = lane / 2;
    if (lane % 2 == 0) sums[group * 32 + sum / 8 * 16 + first + sum % 8] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id >= 16) return;
  const uint out = expert * H + row + thread_id;
  float g = float(gate_bias[out]), u = float(up_bias[out]);
  UNROLL for (uint i = 0; i < groups; i++) {
    g += sums[i * 32 + thread_id];
    u += sums[i * 32 + 16 + thread_id];
  }
  h[(b * CHOSEN + tile.y) * H + row + thread_id] = T(swiglu(g, u, alpha, limit));
}
