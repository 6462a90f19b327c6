// attention_window: one token's attention over the last WINDOW positions, itself included, with sinks.
//   y[h,:] = sum_i 2^(s_i - M) v_i / (2^(sink[h] log2(e) - M) + sum_i 2^(s_i - M)),  s_i = scale log2(e) q_h.k_i
//   over the keys i with position - WINDOW < i <= position: ring row i % WINDOW if i < base, else append row i - base
// Inputs:    q (B,HKV*GROUP,64) T; ring keys and values (B,HKV,WINDOW,64) T; append keys and values (B,HKV,ROWS,64) T;
//            control (B,8) i32: position, base, slot; sinks (HQ,) W
// Output:    y (B,HQ*64) T
// Grid:      HKV x B threadgroups of 8 simdgroups, one for each 32-key tile of ring and append segment: with so few keys
//            the time is latency, and all loads of the window leave at once. The ring is read in place, in ring order.
// Numerics:  float32 scores, softmax and sums; fast exp2; one rounding at the store.
// Requires:  GROUP <= 8; head dim 64; WINDOW % 32 == 0; slot < ROWS; checked in kernels.attention_window.
// Used when: one token a row is decoded in a sliding layer.
// Not fused: the output projection; each of its rows needs all heads.
// Source:    our own; see attention.h.
#include "attention.h"

template <int HKV, int GROUP, int WINDOW, int ROWS, int SIMDS, typename T, typename W, typename C>
METAL_FUNC void attention_window(
    const device T* q, const device T* ring_k, const device T* ring_v, const device T* append_k,
    const device T* append_v, const device C* control, const device W* sinks, device T* y,
    threadgroup float* shared_sums, threadgroup float* shared_ends, float scale, uint3 tile, uint thread_id, uint lane,
    uint group) {
  const uint kv = tile.x, b = tile.y;
  const int position = control[b * 8], base = control[b * 8 + 1], slot = min(int(control[b * 8 + 2]), ROWS - 1);
  Attention<T, GROUP> state;
  state.begin(q + (b * HKV + kv) * GROUP * 64, 64, scale, lane);
  constexpr uint ring_tiles = WINDOW / 32;
  const uint tiles = ring_tiles + slot / 32 + 1;
  for (uint t = group; t < tiles; t += SIMDS) {
    const bool is_append = t >= ring_tiles;
    // The age of a row: how many came after it in its segment, those of the ring around its end. Rows that do not
    // exist come out too old.
    const int newest = is_append ? slot : (base + WINDOW - 1) % WINDOW;
    const uint wrap = is_append ? 0 : WINDOW, ages = is_append ? WINDOW : max(min(base, base - 1 - position + WINDOW), 0);
    const uint first = 32 * (is_append ? t - ring_tiles : t), rows = is_append ? slot + 1 : min(base, WINDOW);
    bool seen[4], any = false;
    UNROLL for (int i = 0; i < 4; i++) {
      const uint age = newest - (first + 8 * i + state.row);
      seen[i] = min(age, age + wrap) < ages;
      any = any || seen[i];
    }
    if (!simd_any(any)) continue;
    const uint start = ((b * HKV + kv) * (is_append ? ROWS : WINDOW) + first) * 64;
    state.tile(seen, rows - 1 - first, (is_append ? append_k : ring_k) + start, (is_append ? append_v : ring_v) + start);
  }
  state.end(shared_sums + group * 512, shared_ends + group * 16);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_id; i < GROUP * 64; i += SIMDS * 32) {
    const uint head = i / 64;
    const float sink = float(sinks[kv * GROUP + head]) * 1.44269504088896340736f;
    float top = sink;
    UNROLL for (uint s = 0; s < SIMDS; s++) top = max(top, shared_ends[s * 16 + 2 * head]);
    float total = metal::fast::exp2(sink - top), sum = 0;
    UNROLL for (uint s = 0; s < SIMDS; s++) {
      const float factor = share(shared_ends[s * 16 + 2 * head], top);
      sum = fma(factor, shared_sums[s * 512 + i], sum);
      total = fma(factor, shared_ends[s * 16 + 2 * head + 1], total);
    }
    y[(b * HKV + kv) * GROUP * 64 + i] = T(sum / total);
  }
}
