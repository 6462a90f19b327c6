// <metal_simdgroup>, <metal_compute>: barriers, and the operations in which the lanes of a simdgroup
// exchange values. Every lane deposits its value and waits; then each computes from all deposits.
#pragma once
namespace metal {
#define EMU_HERE EmuSite site = EmuSite{__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()}
#define EMU_SIMD inline __attribute__((always_inline, nodebug, convergent))
#define EMU_SIMD_BODY inline __attribute__((noinline, convergent)) EMU_UNTRACED

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

EMU_INLINE uint emu_lane() { return emu_thread->thread_index_in_simdgroup; }

// The values the lanes brought to one operation.
template <class T> struct EmuDeposits {
  EmuSimdgroup* simdgroup;
  uint half;
  EMU_INLINE uint mask() const { return simdgroup->mask[half]; }
  EMU_INLINE bool has(uint lane) const { return mask() >> lane & 1; }
  EMU_INLINE EMU_UNTRACED T at(uint lane) const {
    T value;
    __builtin_memcpy(&value, simdgroup->slots[half][lane], sizeof(T));
    return value;
  }
};
template <class T> EMU_SIMD_BODY EmuDeposits<T> emu_exchange(EmuOperation op, T x, EmuSite site) {
  static_assert(sizeof(T) <= 64, "value too large for a simd operation");
  uint half = emu_simd(op, &x, sizeof(T), site);
  return {emu_thread->simdgroup, half};
}

struct EmuSum { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a + b); } };
struct EmuProduct { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a * b); } };
struct EmuMax { template <class T> EMU_INLINE T operator()(T a, T b) const { return max(a, b); } };
struct EmuMin { template <class T> EMU_INLINE T operator()(T a, T b) const { return min(a, b); } };
struct EmuAnd { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a & b); } };
struct EmuOr { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a | b); } };
struct EmuXor { template <class T> EMU_INLINE T operator()(T a, T b) const { return T(a ^ b); } };

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
#define EMU_REDUCTION(name, Op)                                                                   \
  template <class T> EMU_SIMD T simd_##name(T x, EMU_HERE) { return emu_simd_reduce<Op>(x, site); } \
  template <class T> EMU_SIMD T quad_##name(T x, EMU_HERE) { return emu_quad_reduce<Op>(x, site); }
EMU_REDUCTION(sum, EmuSum) EMU_REDUCTION(product, EmuProduct)
EMU_REDUCTION(max, EmuMax) EMU_REDUCTION(min, EmuMin)
EMU_REDUCTION(and, EmuAnd) EMU_REDUCTION(or, EmuOr) EMU_REDUCTION(xor, EmuXor)

template <class Op, class T>
EMU_SIMD_BODY T emu_scan(T x, T start, uint inclusive, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_PREFIX, x, site);
  T result = start;
  for (uint i = 0; i < emu_lane() + inclusive; i++)
    if (all.has(i)) result = Op()(result, all.at(i));
  return result;
}
#define EMU_PREFIX_OPERATION(name, Op, start)                                                     \
  template <class T> EMU_SIMD T simd_prefix_inclusive_##name(T x, EMU_HERE) {                     \
    return emu_scan<Op>(x, T(start), 1, site);                                                    \
  }                                                                                               \
  template <class T> EMU_SIMD T simd_prefix_exclusive_##name(T x, EMU_HERE) {                     \
    return emu_scan<Op>(x, T(start), 0, site);                                                    \
  }
EMU_PREFIX_OPERATION(sum, EmuSum, 0) EMU_PREFIX_OPERATION(product, EmuProduct, 1)

// What lane `from` brought. Reading a lane that takes no part gives garbage on a GPU: all bits set
// here. Past either end of the simdgroup a lane gets `beyond`.
template <class T> EMU_SIMD_BODY T emu_shuffle(T x, T beyond, int from, EmuSite site) {
  EmuDeposits<T> all = emu_exchange(EMU_SHUFFLE, x, site);
  if (from < 0 || from > 31) return beyond;
  if (all.has(uint(from))) return all.at(uint(from));
  T garbage;
  __builtin_memset(&garbage, 0xFF, sizeof(T));
  return garbage;
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
EMU_SIMD_BODY uint emu_ballot(bool vote, EmuSite site) {
  EmuDeposits<bool> all = emu_exchange(EMU_BALLOT, vote, site);
  uint votes = 0;
  for (uint i = 0; i < 32; i++)
    if (all.has(i) && all.at(i)) votes |= 1u << i;
  return votes;
}
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
