// <metal_simdgroup>, <metal_compute>: barriers, and the operations in which the lanes of a simdgroup
// exchange values. Two files give what lies below: msl_exchange_cpu.h and msl_exchange_ptx.h.
#pragma once
namespace metal {
#define EMU_HERE EmuSite site = EmuSite{__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()}
#define EMU_SIMD inline __attribute__((always_inline, nodebug, convergent))

struct EmuSum { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a + b); } };
struct EmuProduct { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a * b); } };
struct EmuMax { template <class T> EMU_INLINE T operator()(T a, T b) const { return max(a, b); } };
struct EmuMin { template <class T> EMU_INLINE T operator()(T a, T b) const { return min(a, b); } };
struct EmuAnd { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a & b); } };
struct EmuOr { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a | b); } };
struct EmuXor { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a ^ b); } };

}  // namespace metal
#ifdef MSL_PTX
#include "msl_exchange_ptx.h"
#else
#include "msl_exchange_cpu.h"
#endif
namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_device_and_threadgroup = 3,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
EMU_SIMD void threadgroup_barrier(mem_flags flags, EMU_HERE) {
  emu_threadgroup_barrier(uint(flags), site);
}
EMU_SIMD void simdgroup_barrier(mem_flags flags, EMU_HERE) {
  emu_simdgroup_barrier(uint(flags), site);
}

#define EMU_REDUCTION(name, Op)                                                                   \
  template <class T> EMU_SIMD T simd_##name(T x, EMU_HERE) { return emu_simd_reduce<Op>(x, site); } \
  template <class T> EMU_SIMD T quad_##name(T x, EMU_HERE) { return emu_quad_reduce<Op>(x, site); }
EMU_REDUCTION(sum, EmuSum) EMU_REDUCTION(product, EmuProduct)
EMU_REDUCTION(max, EmuMax) EMU_REDUCTION(min, EmuMin)
EMU_REDUCTION(and, EmuAnd) EMU_REDUCTION(or, EmuOr) EMU_REDUCTION(xor, EmuXor)

#define EMU_PREFIX_OPERATION(name, Op, start)                                                     \
  template <class T> EMU_SIMD T simd_prefix_inclusive_##name(T x, EMU_HERE) {                     \
    return emu_scan<Op>(x, T(start), 1, site);                                                    \
  }                                                                                               \
  template <class T> EMU_SIMD T simd_prefix_exclusive_##name(T x, EMU_HERE) {                     \
    return emu_scan<Op>(x, T(start), 0, site);                                                    \
  }
EMU_PREFIX_OPERATION(sum, EmuSum, 0) EMU_PREFIX_OPERATION(product, EmuProduct, 1)

// What lane `from` brought; past either end of the simdgroup a lane gets `beyond`.
template <class T> EMU_SIMD_BODY T emu_shuffle(T x, T beyond, int from, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_SHUFFLE, x, site);
  T there = all.at(uint(from) & 31);
  return from < 0 || from > 31 ? beyond : there;
}
#define EMU_SHUFFLE_OPERATION(name, from)                                                         \
  template <class T> EMU_SIMD T name(T x, ushort k, EMU_HERE) {                                   \
    int lane = int(emu_lane());                                                                   \
    (void)lane;                                                                                   \
    return emu_shuffle(x, x, from, site);                                                         \
  }
EMU_SHUFFLE_OPERATION(simd_shuffle, k) EMU_SHUFFLE_OPERATION(simd_broadcast, k)
EMU_SHUFFLE_OPERATION(simd_shuffle_xor, lane ^ k)
EMU_SHUFFLE_OPERATION(simd_shuffle_down, lane + k) EMU_SHUFFLE_OPERATION(simd_shuffle_up, lane - k)
EMU_SHUFFLE_OPERATION(simd_shuffle_rotate_down, (lane + k) & 31)
EMU_SHUFFLE_OPERATION(simd_shuffle_rotate_up, (lane - k) & 31)
EMU_SHUFFLE_OPERATION(quad_shuffle, (lane & ~3) | (k & 3))
EMU_SHUFFLE_OPERATION(quad_broadcast, (lane & ~3) | (k & 3))
EMU_SHUFFLE_OPERATION(quad_shuffle_xor, (lane & ~3) | ((lane ^ k) & 3))
template <class T> EMU_SIMD T simd_shuffle_and_fill_down(T x, T fill, ushort k, EMU_HERE) {
  T beyond = emu_shuffle(fill, fill, int(emu_lane()) + k - 32, site);
  return emu_shuffle(x, beyond, int(emu_lane()) + k, site);
}
template <class T> EMU_SIMD T simd_shuffle_and_fill_up(T x, T fill, ushort k, EMU_HERE) {
  T beyond = emu_shuffle(fill, fill, int(emu_lane()) - k + 32, site);
  return emu_shuffle(x, beyond, int(emu_lane()) - k, site);
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t votes;
  EMU_INLINE explicit simd_vote(vote_t v = 0) : votes(v) {}
  EMU_INLINE explicit operator vote_t() const { return votes; }
  EMU_INLINE bool all() const { return votes == 0xFFFFFFFFul; }
  EMU_INLINE bool any() const { return votes != 0; }
};
EMU_SIMD simd_vote simd_ballot(bool vote, EMU_HERE) { return simd_vote(emu_ballot(vote, site)); }
EMU_SIMD simd_vote simd_active_threads_mask(EMU_HERE) { return simd_vote(emu_ballot(true, site)); }
EMU_SIMD bool simd_any(bool vote, EMU_HERE) { return emu_ballot(vote, site) != 0; }
EMU_SIMD bool simd_all(bool vote, EMU_HERE) { return emu_ballot(!vote, site) == 0; }
EMU_SIMD bool simd_is_first(EMU_HERE) {
  return uint(__builtin_ctz(emu_ballot(true, site))) == emu_lane();
}
template <class T> EMU_SIMD_BODY T emu_broadcast_first(T x, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_SHUFFLE, x, site);
  return all.at(uint(__builtin_ctz(all.mask())));
}
template <class T> EMU_SIMD T simd_broadcast_first(T x, EMU_HERE) {
  return emu_broadcast_first(x, site);
}
}  // namespace metal
