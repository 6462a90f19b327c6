// attention_window_prefill: attention of a chunk of T tokens, each over the last WINDOW positions, itself included, with sinks.
//   y[t,h,:] = sum_i 2^(s_i - M) v_i / (2^(sink[h] log2(e) - M) + sum_i 2^(s_i - M)),  s_i = scale log2(e) q[t,h].k_i
//   over the rows i of keys and values with t < i <= t + WINDOW and i >= first[b]
// Inputs:    q (B,HKV*GROUP,T,64) T; keys and values (B,HKV,WINDOW+T,64) T: the WINDOW positions before the chunk, then its
//            own; first (B,) i32, the first row that exists, in whatever address space; sinks (HQ,) W
// Output:    y (B,T,HQ*64) T
// Grid:      T/SIMDS x HKV x B threadgroups of SIMDS simdgroups, one token each. Its GROUP heads and the neighbours share
//            K and V, staged in tiles of 32 rows: a row is read 1 + WINDOW/SIMDS times. 8 simdgroups of 95 registers
//            (of another GPU): a core should hold about two groups, so that one computes while the other waits for its
//            tile. Two tokens a simdgroup took 154.
// Numerics:  float32 scores, running softmax and sums; fast exp2; one rounding at the store.
// Requires:  GROUP <= 8; head dim 64; WINDOW % 32 == 0; checked in kernels.attention_window_prefill. Sinks above -1e30.
// Used when: several tokens a row enter a sliding layer.
// Not fused: the output projection; each of its rows needs all heads.
// Source:    our own; see attention.h.
#include "attention.h"

constant constexpr uint TILE = 32;

// Two tiles of rows in chunks of 16 bytes, one chunk of padding a row: the 8 rows of a load lie in different banks.
template <typename T>
struct Tiles {
  static constexpr constant uint each = 16 / sizeof(T), chunks = 64 / each, stride = chunks + 1;

  // 8 dims of a row, of which `chunk` holds the first.
  static METAL_FUNC void load(const threadgroup uint4* chunk, thread float* x) {
    UNROLL for (uint i = 0; i < 8 / each; i++) Packed<T>::unpack(chunk[i], x + i * each);
  }
};

template <int HKV, int GROUP, int WINDOW, int SIMDS, typename T, typename W, typename First>
METAL_FUNC void attention_window_prefill(
    const device T* q, const device T* keys, const device T* values, const device W* sinks, First first, device T* y,
    threadgroup uint4* tiles, float scale, uint tokens, uint3 tile, uint thread_id, uint lane, uint group) {
  typedef Tiles<T> Rows;
  const uint block = SIMDS * tile.x, plane = tile.z * HKV + tile.y, rows = WINDOW + tokens, token = block + group;
  const uint end = min(block + SIMDS + WINDOW, rows), begin = max(int(first[tile.z]), 0);
  const device uint4* k = (const device uint4*)keys + ulong(plane) * rows * Rows::chunks;
  const device uint4* v = (const device uint4*)values + ulong(plane) * rows * Rows::chunks;
  threadgroup uint4* other = tiles + TILE * Rows::stride;

  Attention<T, GROUP> state;
  state.begin(q + (ulong(plane) * GROUP * tokens + min(token, tokens - 1)) * 64, tokens * 64, scale, lane);
  // the sink is a key of which only the weight counts
  const uint head = 2 * state.pair, last = GROUP - 1;
  const device W* sink = sinks + tile.y * GROUP;
  state.top = float2(float(sink[min(head, last)]), float(sink[min(head + 1, last)])) * 1.44269504088896340736f;
  state.total = state.row == 0 ? 1.0f : 0.0f;

  for (uint start = block + (begin > block ? (begin - block) / TILE * TILE : 0); start < end; start += TILE) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_id; i < TILE * Rows::chunks; i += SIMDS * 32) {
      const uint from = start + i / Rows::chunks, chunk = i % Rows::chunks, to = i / Rows::chunks * Rows::stride + chunk;
      const bool exists = from >= begin && from < end;  // else zeros: 0 * NaN is NaN
      tiles[to] = exists ? k[from * Rows::chunks + chunk] : uint4(0);
      other[to] = exists ? v[from * Rows::chunks + chunk] : uint4(0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int low = int(max(token + 1, begin) - start), high = int(token + WINDOW - start);  // rows that are seen
    const uint count = max(high - low + 1, 0);  // padding sees none
    float2 scores[4], best = state.top;
    UNROLL for (int i = 0; i < 4; i++) {
      if (8 * i + 7 < low || 8 * i > high) continue;
      const int row = 8 * i + state.row;
      float x[16];
      const threadgroup uint4* own = tiles + row * Rows::stride + state.pair * 8 / Rows::each;
      Rows::load(own, x);
      Rows::load(own + 32 / Rows::each, x + 8);
      scores[i] = state.score(x, uint(row - low) < count);
      best = max(best, scores[i]);
    }
    state.raise(best);
    UNROLL for (int i = 0; i < 4; i++) {
      if (8 * i + 7 < low || 8 * i > high) continue;
      float x[2][8];
      UNROLL for (int c = 0; c < 2; c++)
        Rows::load(other + (8 * i + 2 * state.pair + c) * Rows::stride + state.row * 8 / Rows::each, x[c]);
      state.add(scores[i], x);
    }
  }

  state.add_totals();
  if (token >= tokens) return;
  UNROLL for (uint c = 0; c < 2; c++) {
    if (head + c >= uint(GROUP)) return;
    device T* to = y + (((ulong(tile.z) * tokens + token) * HKV + tile.y) * GROUP + head + c) * 64 + state.row * 8;
    const float total = state.total[c];
    UNROLL for (int d = 0; d < 8; d += 4)
      store4(to + d, state.out[d][c] / total, state.out[d + 1][c] / total, state.out[d + 2][c] / total, state.out[d + 3][c] / total);
  }
}
