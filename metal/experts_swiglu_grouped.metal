// experts_swiglu_grouped: experts_swiglu of a batch, each expert's codes read once for up to 4 of its rows.
//   h[p,j] = swiglu(Wg[e,j,:] . x[p / CHOSEN,:] + bg[e,j], Wu[e,j,:] . x[p / CHOSEN,:] + bu[e,j])  for the pairs p of a block
// Inputs:    x (B,D) T; blocks (M,8) i32 of expert_groups; gate and up as in experts_swiglu
// Output:    h (B,CHOSEN,H) T
// Grid:      H/16 x M threadgroups of 16 gate/up pairs and 1 to 4 vectors: 2 x 3 simdgroups, 2 vectors each, for each
//            third of the 90 blocks of 32 columns: 192 threads that read the codes together; those of empty blocks end
//            at once. 4 vectors a simdgroup took 187 registers: compilers keep them as floats.
// Numerics:  as experts_swiglu, and the same bits: sums are added in its order.
// Requires:  as experts_swiglu; blocks of expert_groups; checked in kernels.experts_swiglu_grouped.
// Used when: a batch is so large that its rows share experts, see kernels/batches.py.
// Not fused: the down projection; each of its rows needs the whole of h.
// Source:    our own; decode of the codes as in experts_swiglu.
#include "mxfp4.h"
#include "swiglu.h"

template <int D, int H, int CHOSEN, typename T, typename W>
METAL_FUNC void experts_swiglu_grouped(
    const device T* x, const device int* blocks, const device uint* gate_weight, const device uchar* gate_scales,
    const device W* gate_bias, const device uint* up_weight, const device uchar* up_scales, const device W* up_bias,
    device T* h, threadgroup float* sums, float alpha, float limit, uint3 tile, uint thread_id, uint lane, uint group) {
  constexpr uint width = D / 32, groups = (width + 31) / 32, lanes = width / groups;
  const device int* own = blocks + tile.y * 8;
  const uint expert = own[0], count = own[1], row = tile.x * 16, part = group % groups, pair = group / groups * 2;
  if (count == 0) return;
  if (pair < count) {
    const uint block = part * lanes + min(lane, lanes - 1);
    typename Pair<T>::type values[2][16];
    UNROLL for (int r = 0; r < 2; r++) stage_block(x + own[2 + pair + r] / CHOSEN * D + block * 32, values[r]);
    const uint at = (expert * H + row) * width + block;
    const device uint4* gate = (const device uint4*)gate_weight + at;
    const device uint4* up = (const device uint4*)up_weight + at;
    const float scale = lane < lanes ? DECODE_SCALE : 0.0f;
    for (uint first = 0; first < 16; first += 4) {
      float partial[16];  // 4 rows of gate for either vector, then of up
      UNROLL for (uint n = 0; n < 4; n += 2) {
        uint4 codes[4];
        float exponents[4];
        UNROLL for (uint i = 0; i < 2; i++) {
          const uint next = (first + n + i) * width;
          codes[i] = gate[next];
          codes[2 + i] = up[next];
          exponents[i] = block_scale(gate_scales[at + next]);
          exponents[2 + i] = block_scale(up_scales[at + next]);
        }
        UNROLL for (uint i = 0; i < 4; i++) {
          float products[2];
          dot_block<2>(codes[i], values, products);
          UNROLL for (uint r = 0; r < 2; r++) partial[i / 2 * 8 + r * 4 + n + i % 2] = products[r] * (exponents[i] * scale);
        }
      }
      const float total = sum16(partial, lane);
      const uint sum = lane / 2, of_up = sum / 8, r = pair + sum / 4 % 2;
      if (lane % 2 == 0) sums[((r * groups + part) * 2 + of_up) * 16 + first + sum % 4] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_id; i < 16 * count; i += 64 * groups) {
    const uint r = i / 16, n = i % 16, out = expert * H + row + n;
    float g = float(gate_bias[out]), u = float(up_bias[out]);
    UNROLL for (uint p = 0; p < groups; p++) {
      g += sums[(r * groups + p) * 32 + n];
      u += sums[(r * groups + p) * 32 + 16 + n];
    }
    h[uint(own[2 + r]) * H + row + n] = T(swiglu(g, u, alpha, limit));
  }
}
