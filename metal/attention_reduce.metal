// attention_reduce: joins the splits of attention_decode and adds the sink to the softmax's denominator.
//   y[h,:] = sum_s 2^(m[h,s] - M) sums[h,s,:] / (2^(sink[h] log2(e) - M) + sum_s 2^(m[h,s] - M) l[h,s])
// Inputs:    sums (B,HQ,SPLITS,64) f32; ends (B,HQ,SPLITS,2) f32: m and l; sinks (HQ,) W
// Output:    y (B,HQ*64) T
// Grid:      HQ x B threadgroups of 64 threads, one a dim: every load of `sums` is two whole 128-byte lines.
// Numerics:  float32, one rounding at the store.
// Requires:  head dim 64; checked in kernels.attention_reduce.
// Used when: after attention_decode.
// Not fused: the output projection; each of its rows needs all heads.
// Source:    our own.
#include "attention.h"

template <int HQ, typename T, typename W>
METAL_FUNC void attention_reduce(
    const device float* sums, const device float* ends, const device W* sinks, device T* y, uint splits, uint3 tile,
    uint thread_id) {
  const uint head = tile.y * HQ + tile.x;
  const float sink = float(sinks[tile.x]) * 1.44269504088896340736f;
  float top = sink;
  for (uint s = 0; s < splits; s++) top = max(top, ends[(head * splits + s) * 2]);
  float total = metal::fast::exp2(sink - top), sum = 0;
  for (uint s = 0; s < splits; s++) {
    const float factor = share(ends[(head * splits + s) * 2], top);
    total = fma(factor, ends[(head * splits + s) * 2 + 1], total);
    sum = fma(factor, sums[(head * splits + s) * 64 + thread_id], sum);
  }
  y[head * 64 + thread_id] = T(sum / total);
}
