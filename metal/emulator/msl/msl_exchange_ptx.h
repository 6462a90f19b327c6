// Exchange between lanes that are threads of an NVIDIA warp.
#pragma once
namespace metal {
#define EMU_SIMD_BODY inline __attribute__((always_inline, convergent))
#define EMU_ATOMIC_BODY EMU_INLINE
constexpr uint EMU_ALL = ~0u;

EMU_SIMD void emu_threadgroup_barrier(uint, EmuSite) { __nvvm_barrier_sync(0); }
EMU_SIMD void emu_simdgroup_barrier(uint, EmuSite) { __nvvm_bar_warp_sync(EMU_ALL); }
EMU_INLINE uint emu_lane() { return __nvvm_read_ptx_sreg_laneid(); }

template <class T> EMU_SIMD T emu_from_lane(T x, uint lane) {
  constexpr int words = (sizeof(T) + 3) / 4;
  int word[words] = {};
  __builtin_memcpy(word, &x, sizeof(T));
  for (int i = 0; i < words; i++) word[i] = __nvvm_shfl_sync_idx_i32(EMU_ALL, word[i], lane, 31);
  __builtin_memcpy(&x, word, sizeof(T));
  return x;
}
// Reading another lane's value is a shuffle, so all lanes must do it together.
template <class T> struct EmuDeposits {
  T mine;
  EMU_INLINE uint mask() const { return EMU_ALL; }
  EMU_SIMD T at(uint lane) const { return emu_from_lane(mine, lane); }
};
template <class T> EMU_SIMD EmuDeposits<T> emu_exchange(EmuOperation, T x, EmuSite) { return {x}; }

template <class Op, class T> EMU_SIMD T emu_simd_reduce(T x, EmuSite) {
  for (uint distance = 16; distance; distance /= 2)
    x = Op()(x, emu_from_lane(x, emu_lane() ^ distance));
  return x;
}
template <class Op, class T> EMU_SIMD T emu_quad_reduce(T x, EmuSite) {
  for (uint distance = 2; distance; distance /= 2)
    x = Op()(x, emu_from_lane(x, emu_lane() ^ distance));
  return x;
}
template <class Op, class T> EMU_SIMD T emu_scan(T x, T start, uint inclusive, EmuSite) {
  uint lane = emu_lane();
  for (uint distance = 1; distance < 32; distance *= 2) {
    T before = emu_from_lane(x, (lane - distance) & 31);
    if (lane >= distance) x = Op()(before, x);
  }
  if (inclusive) return x;
  T before = emu_from_lane(x, (lane - 1) & 31);
  return lane == 0 ? start : before;
}
EMU_SIMD uint emu_ballot(bool vote, EmuSite) { return __nvvm_vote_ballot_sync(EMU_ALL, vote); }
}  // namespace metal

EMU_INLINE void emu_atomic(const void*, uint32_t, EmuAtomic, EmuSite) {}
EMU_INLINE EmuThread emu_this_thread() {
  EmuThread t{};
#define EMU_SREG(name)                                                                            \
  EmuUint3{(uint)__nvvm_read_ptx_sreg_##name##_x(), (uint)__nvvm_read_ptx_sreg_##name##_y(),      \
           (uint)__nvvm_read_ptx_sreg_##name##_z()}
  t.thread_position_in_threadgroup = EMU_SREG(tid);
  t.threadgroup_position_in_grid = EMU_SREG(ctaid);
  t.threads_per_threadgroup = EMU_SREG(ntid);
  t.threadgroups_per_grid = EMU_SREG(nctaid);
  EmuUint3 p = t.thread_position_in_threadgroup, g = t.threadgroup_position_in_grid;
  EmuUint3 n = t.threads_per_threadgroup, m = t.threadgroups_per_grid;
  t.dispatch_threads_per_threadgroup = n;
  t.thread_position_in_grid = {g.x * n.x + p.x, g.y * n.y + p.y, g.z * n.z + p.z};
  t.threads_per_grid = {m.x * n.x, m.y * n.y, m.z * n.z};
  uint i = p.x + n.x * (p.y + n.y * p.z), threads = n.x * n.y * n.z;
  t.thread_index_in_threadgroup = i;
  t.thread_index_in_simdgroup = i % 32;
  t.simdgroup_index_in_threadgroup = i / 32;
  t.simdgroups_per_threadgroup = t.dispatch_simdgroups_per_threadgroup = (threads + 31) / 32;
  t.threads_per_simdgroup = 32;
  t.quadgroup_index_in_threadgroup = i / 4;
  t.thread_index_in_quadgroup = i % 4;
  t.quadgroups_per_threadgroup = (threads + 3) / 4;
  return t;
}
