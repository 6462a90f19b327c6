// embed: the embedding rows of the current tokens, out of the quantised or plain table.
//   x[b,:] = W[token[b],:]
// Inputs:    token (B,) i32, < V, in whatever address space MLX gives so few values; weight (V,D) in format F
// Output:    x (B,D) T
// Grid:      B threadgroups of one simdgroup for each third of D (matvec.h); a lane stores the 32 columns it reads.
// Numerics:  float32 scale and bias, one rounding at the store.
// Requires:  D fills whole simdgroups (matvec.h); ids in range; checked in kernels.embed, ids by the engine.
// Used when: a decode step starts: one dispatch instead of MLX's three gathers and a dequantisation.
// Not fused: the first layer's norm; it would repeat the lookup in each of its threadgroups.
// Source:    our own.
#include "matvec.h"

template <typename F, typename T, typename Tokens>
METAL_FUNC void embed(Tokens token, F weight, device T* x, uint3 tile, uint lane, uint group) {
  const uint at = first_load<F>(group, lane);
  typename F::Load row[F::loads];
  UNROLL for (int i = 0; i < F::loads; i++) weight.read(uint(token[tile.x]), at + i * Split<F::columns>::lanes, row[i]);
  if (lane >= uint(Split<F::columns>::lanes)) return;
  UNROLL for (int i = 0; i < F::loads; i++) {
    float values[F::per_load];
    F::unpack(row[i], values);
    const uint column = (at + i * Split<F::columns>::lanes) * F::per_load;
    UNROLL for (int j = 0; j < F::per_load; j++) x[tile.x * F::columns + column + j] = T(values[j]);
  }
}
