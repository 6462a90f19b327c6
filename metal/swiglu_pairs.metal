// swiglu_pairs: the biases of the gate and up products of sorted pairs, and the clamped SwiGLU.
//   h[p] = swiglu(gate[p] + gate_bias[e[p]], up[p] + up_bias[e[p]])
// Inputs:    gate and up (P,H) T; experts (P,) u32, in whatever address space MLX gives so few values; biases (E,H) W
// Output:    h (P,H) T
// Grid:      P threadgroups, one for each pair, a thread for 8 columns: neighbours read the same expert's biases.
// Numerics:  float32, one rounding at the store.
// Requires:  H % 8 == 0 and at most 8192; checked in kernels.swiglu_pairs.
// Used when: MLX's grouped products of a chunk are done.
// Not fused: the products; they are MLX's.
// Source:    our own.
#include "simd.h"
#include "swiglu.h"

template <int H, typename T, typename W, typename Ids>
METAL_FUNC void swiglu_pairs(
    const device T* gate, const device T* up, Ids experts, const device W* gate_bias, const device W* up_bias, device T* h,
    float alpha, float limit, uint3 tile, uint thread_id) {
  const uint column = thread_id * 8;
  if (column >= uint(H)) return;
  const ulong at = ulong(tile.x) * H + column, bias = ulong(experts[tile.x]) * H + column;
  float g[8], u[8], added[8];
  load<8>(gate + at, g);
  load<8>(gate_bias + bias, added);
  UNROLL for (int i = 0; i < 8; i++) g[i] += added[i];
  load<8>(up + at, u);
  load<8>(up_bias + bias, added);
  UNROLL for (int i = 0; i < 8; i++) g[i] = swiglu(g[i], u[i] + added[i], alpha, limit);
  UNROLL for (int i = 0; i < 8; i += 4) store4(h + at + i, g[i], g[i + 1], g[i + 2], g[i + 3]);
}
