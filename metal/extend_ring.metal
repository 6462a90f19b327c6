// extend_ring: the WINDOW positions before a chunk and the chunk's own, in order, and the ring that holds the last of them.
//   keys[i] = i < WINDOW ? ring[(offset + i) % WINDOW] : k[i - WINDOW];  new_ring[(offset + i) % WINDOW] = keys[i] where i >= TOKENS
// Inputs:    ring_k and ring_v (B,HKV,WINDOW,64) T: position p in row p % WINDOW; k and v (B,HKV,TOKENS,64) T; offset (1,)
//            i32, the position of the chunk's first token
// Output:    keys and values (B,HKV,WINDOW+TOKENS,64); new_ring_k and new_ring_v (B,HKV,WINDOW,64) T
// Grid:      a thread for 16 bytes of a row of keys and of values: what is read once is stored where it is needed.
// Numerics:  copies.
// Requires:  head dim 64; checked in kernels.extend_ring.
// Used when: a chunk enters a sliding layer.
// Not fused: the attention, whose threadgroups read these rows 17 times.
// Source:    our own.

template <int WINDOW, typename T, typename Offset>
METAL_FUNC void extend_ring(
    const device T* ring_k, const device T* ring_v, const device T* k, const device T* v, Offset offset, device T* keys,
    device T* values, device T* new_ring_k, device T* new_ring_v, uint tokens, uint3 tile, uint thread_id, uint threads) {
  constexpr uint chunks = 64 * sizeof(T) / 16;
  const uint at = tile.x * threads + thread_id, row = at / chunks, chunk = at % chunks, plane = tile.y, rows = WINDOW + tokens;
  if (row >= rows) return;
  const ulong slot = (ulong(plane) * WINDOW + (uint(offset[0]) + row) % WINDOW) * chunks + chunk;
  const bool is_new = row >= uint(WINDOW);
  const ulong from = is_new ? (ulong(plane) * tokens + row - WINDOW) * chunks + chunk : slot;
  const uint4 key = ((const device uint4*)(is_new ? k : ring_k))[from];
  const uint4 value = ((const device uint4*)(is_new ? v : ring_v))[from];
  const ulong to = (ulong(plane) * rows + row) * chunks + chunk;
  ((device uint4*)keys)[to] = key;
  ((device uint4*)values)[to] = value;
  if (row < tokens) return;
  ((device uint4*)new_ring_k)[slot] = key;
  ((device uint4*)new_ring_v)[slot] = value;
}
