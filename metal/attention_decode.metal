// attention_decode: one token's attention over the full cache, split over the keys; attention_reduce finishes it.
//   sums[h,s,:] = sum_i exp2(c q_h.k_i - m) v_i, m[h,s] = max_i c q_h.k_i, l[h,s] = sum_i exp2(c q_h.k_i - m), c = scale log2(e)
//   over the keys i of split s: rows [0, base) of the frozen segment, then rows [0, slot] of the append segment
// Inputs:    q (B,HKV*GROUP,64) T; frozen keys and values (B,HKV,CAP,64) T; append keys and values (B,HKV,ROWS,64) T;
//            control (B,8) i32: position, base, slot
// Output:    sums (B,HQ,SPLITS,64) f32; ends (B,HQ,SPLITS,2) f32: m and l; a split without keys writes -1e30, 0
// Grid:      HKV x SPLITS x B threadgroups of SIMDS simdgroups. One group serves all query heads of a KV head, so K and V
//            are read once. 4 simdgroups: small enough that several groups share a core, 8 KB in flight each. Capacity
//            and splits are no constants: a growing cache must not compile a kernel at each of its sizes.
// Numerics:  float32 scores, softmax and sums; exp2 is the fast one (error 2^-22 or so, under the float32 tolerance).
// Requires:  GROUP <= 8; head dim 64; 0 < CAP; base <= CAP; slot < ROWS; rows in use hold numbers; checked in
//            kernels.attention_decode.
// Used when: one token a row is decoded in a full-attention layer.
// Not fused: the reduction; splits of one head end in different groups.
// Source:    our own; matrix lane map after mlx/backend/metal/kernels/steel/gemm/mma.h (MIT), see NOTICE.
#include "attention.h"

template <int HKV, int GROUP, int ROWS, int SIMDS, typename T, typename C>
METAL_FUNC void attention_decode(
    const device T* q, const device T* frozen_k, const device T* frozen_v, const device T* append_k,
    const device T* append_v, const device C* control, device float* sums, device float* ends,
    threadgroup float* shared_sums, threadgroup float* shared_ends, float scale, uint capacity, uint splits, uint3 tile,
    uint thread_id, uint lane, uint group) {
  const uint kv = tile.x, split = tile.y, b = tile.z, plane = b * HKV + kv;
  const uint base = min(uint(control[b * 8 + 1]), capacity), live = min(uint(control[b * 8 + 2]) + 1, uint(ROWS));
  const uint frozen_tiles = (base + 31) / 32, tiles = frozen_tiles + (live + 31) / 32;
  const uint first = tiles * split / splits, last = tiles * (split + 1) / splits;
  const device T* k = frozen_k + ulong(plane) * capacity * 64;
  const device T* v = frozen_v + ulong(plane) * capacity * 64;
  append_k += plane * ROWS * 64;
  append_v += plane * ROWS * 64;
  Attention<T, GROUP> state;
  state.begin(q + plane * GROUP * 64, 64, scale, lane);
  for (uint t = first + group; t < last; t += SIMDS) {
    const bool is_append = t >= frozen_tiles;
    const uint start = 32 * (is_append ? t - frozen_tiles : t), end = (is_append ? live : base) - 1 - start;
    bool seen[4];
    UNROLL for (int i = 0; i < 4; i++) seen[i] = 8 * i + state.row <= end;
    state.tile(seen, end, (is_append ? append_k : k) + start * 64, (is_append ? append_v : v) + start * 64);
  }
  state.end(shared_sums + group * 512, shared_ends + group * 16);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_id; i < GROUP * 64; i += SIMDS * 32) {
    const uint head = i / 64, out = ((b * HKV + kv) * GROUP + head) * splits + split;
    float top = NEVER, sum = 0, total = 0;
    UNROLL for (uint s = 0; s < SIMDS; s++) top = max(top, shared_ends[s * 16 + 2 * head]);
    UNROLL for (uint s = 0; s < SIMDS; s++) {
      const float factor = share(shared_ends[s * 16 + 2 * head], top);
      sum = fma(factor, shared_sums[s * 512 + i], sum);
      total = fma(factor, shared_ends[s * 16 + 2 * head + 1], total);
    }
    sums[out * 64 + i % 64] = sum;
    if (i % 64 == 0) {
      ends[out * 2] = top;
      ends[out * 2 + 1] = total;
    }
  }
}
