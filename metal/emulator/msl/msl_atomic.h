// <metal_atomic>: relaxed atomics on device and threadgroup memory. They bypass the load and store
// hooks, which would call every counter a race, and announce themselves instead.
#pragma once
namespace metal {
enum memory_order { memory_order_relaxed };
enum class thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

template <class T, class F>
EMU_ATOMIC_BODY T emu_read_modify_write(T* a, F next, EmuSite site) {
  emu_atomic(a, sizeof(T), EMU_ATOMIC_READS, site);
  T old, desired;
  __atomic_load(a, &old, __ATOMIC_RELAXED);
  do desired = next(old);
  while (!__atomic_compare_exchange(a, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
EMU_ATOMIC_BODY void emu_store(T* a, T desired, EmuSite site) {
  emu_atomic(a, sizeof(T), EMU_ATOMIC_STORES, site);
  __atomic_store(a, &desired, __ATOMIC_RELAXED);
}
template <class T>
EMU_ATOMIC_BODY bool emu_exchange_if(T* a, T* expected, T desired,
                                                                   EmuSite site) {
  emu_atomic(a, sizeof(T), EMU_ATOMIC_READS, site);
  return __atomic_compare_exchange(a, expected, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

#define EMU_ATOMIC(space, name, next)                                                      \
  template <class T>                                                                              \
  EMU_INLINE T name(volatile space atomic<T>* a, emu_same<T> x, memory_order, EMU_HERE) {         \
    return emu_read_modify_write((T*)&a->value, [=](T old) EMU_UNTRACED { return T(next); }, site); \
  }
#define EMU_ATOMICS(space)                                                                        \
  EMU_ATOMIC(space, atomic_exchange_explicit, ((void)old, x))                                   \
  EMU_ATOMIC(space, atomic_fetch_add_explicit, old + x)                                         \
  EMU_ATOMIC(space, atomic_fetch_sub_explicit, old - x)                                         \
  EMU_ATOMIC(space, atomic_fetch_max_explicit, old < x ? x : old)                               \
  EMU_ATOMIC(space, atomic_fetch_min_explicit, x < old ? x : old)                               \
  EMU_ATOMIC(space, atomic_fetch_and_explicit, old & x)                                         \
  EMU_ATOMIC(space, atomic_fetch_or_explicit, old | x)                                          \
  EMU_ATOMIC(space, atomic_fetch_xor_explicit, old ^ x)                                         \
  template <class T>                                                                              \
  EMU_INLINE T atomic_load_explicit(const volatile space atomic<T>* a, memory_order, EMU_HERE) {  \
    return emu_read_modify_write((T*)&a->value, [](T old) EMU_UNTRACED { return old; }, site);    \
  }                                                                                               \
  template <class T>                                                                              \
  EMU_INLINE void atomic_store_explicit(volatile space atomic<T>* a, emu_same<T> x,               \
                                        memory_order, EMU_HERE) {                                 \
    emu_store((T*)&a->value, T(x), site);                                                         \
  }                                                                                               \
  template <class T>                                                                              \
  EMU_INLINE void atomic_max_explicit(volatile space atomic<T>* a, emu_same<T> x,                 \
                                      memory_order order, EMU_HERE) {                             \
    atomic_fetch_max_explicit(a, x, order, site);                                                 \
  }                                                                                               \
  template <class T>                                                                              \
  EMU_INLINE void atomic_min_explicit(volatile space atomic<T>* a, emu_same<T> x,                 \
                                      memory_order order, EMU_HERE) {                             \
    atomic_fetch_min_explicit(a, x, order, site);                                                 \
  }                                                                                               \
  template <class T>                                                                              \
  EMU_INLINE bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* a,              \
                                                        thread T* expected, emu_same<T> x,        \
                                                        memory_order, memory_order, EMU_HERE) {   \
    return emu_exchange_if((T*)&a->value, expected, x, site);                                     \
  }
#ifdef MSL_STRICT
EMU_ATOMICS(device) EMU_ATOMICS(threadgroup)
#else
EMU_ATOMICS()
#endif
EMU_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope) {}
}  // namespace metal

// A buffer of atomics holds their values.
template <class T> struct emu_vector<metal::atomic<T>> {
  static constexpr int lanes = 0;
  using element = T;
};
