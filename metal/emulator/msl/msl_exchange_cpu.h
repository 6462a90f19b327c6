// Exchange between lanes that are fibers: every lane deposits its value and waits; then each computes
// from all deposits.
#pragma once
namespace metal {
#define EMU_SIMD_BODY inline __attribute__((noinline, convergent)) EMU_UNTRACED
#define EMU_ATOMIC_BODY inline __attribute__((noinline)) EMU_UNTRACED

EMU_INLINE uint emu_lane() { return emu_thread->thread_index_in_simdgroup; }

// The values the lanes brought to one operation.
template <class T> struct EmuDeposits {
  EmuSimdgroup* simdgroup;
  uint half;
  EMU_INLINE uint mask() const { return simdgroup->mask[half]; }
  EMU_INLINE bool has(uint lane) const { return mask() >> lane & 1; }
  // Reading a lane that takes no part gives garbage on a GPU: all bits set here.
  EMU_INLINE EMU_UNTRACED T at(uint lane) const {
    T value;
    if (has(lane)) __builtin_memcpy(&value, simdgroup->slots[half][lane], sizeof(T));
    else __builtin_memset(&value, 0xFF, sizeof(T));
    return value;
  }
};
template <class T> EMU_SIMD_BODY EmuDeposits<T> emu_exchange(EmuOperation op, T x, EmuSite site) {
  static_assert(sizeof(T) <= 64, "value too large for a simd operation");
  uint half = emu_simd(op, &x, sizeof(T), site);
  return {emu_thread->simdgroup, half};
}

// Combines the selected lanes in the order of a butterfly: pairs at distance 16, 8, 4, 2, 1.
template <class Op, class T>
inline __attribute__((noinline)) EMU_UNTRACED T emu_combine(EmuDeposits<T> all, uint selected) {
  T value[32];
  bool live[32];
  for (uint i = 0; i < 32; i++) {
    live[i] = selected >> i & 1;
    value[i] = live[i] ? all.at(i) : T{};
  }
  for (uint distance = 16; distance; distance /= 2)
    for (uint i = 0; i < distance; i++)
      if (live[i + distance]) {
        value[i] = live[i] ? Op()(value[i], value[i + distance]) : value[i + distance];
        live[i] = true;
      }
  return value[0];
}
template <class Op, class T> EMU_SIMD_BODY T emu_simd_reduce(T x, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_REDUCE, x, site);
  EmuSimdgroup* group = all.simdgroup;
  T result;
  if (!group->reduced[all.half]) {  // the first lane computes for all
    result = emu_combine<Op>(all, all.mask());
    __builtin_memcpy(group->result[all.half], &result, sizeof(T));
    group->reduced[all.half] = 1;
  }
  __builtin_memcpy(&result, group->result[all.half], sizeof(T));
  return result;
}
template <class Op, class T> EMU_SIMD_BODY T emu_quad_reduce(T x, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_REDUCE, x, site);
  return emu_combine<Op>(all, all.mask() & 0xFu << (emu_lane() & ~3u));
}
template <class Op, class T>
EMU_SIMD_BODY T emu_scan(T x, T start, uint inclusive, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_PREFIX, x, site);
  T result = start;
  for (uint i = 0; i < emu_lane() + inclusive; i++)
    if (all.has(i)) result = Op()(result, all.at(i));
  return result;
}
EMU_SIMD_BODY uint emu_ballot(bool vote, EmuSite site) {
  EmuDeposits<bool> all = emu_exchange(EMU_BALLOT, vote, site);
  uint votes = 0;
  for (uint i = 0; i < 32; i++)
    if (all.has(i) && all.at(i)) votes |= 1u << i;
  return votes;
}
}  // namespace metal
