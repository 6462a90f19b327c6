// Scalars, vectors, packed vectors, constructors, conversions; address spaces and Metal's macros.
#pragma once
#define __METAL__ 1
#define __METAL_VERSION__ 320

#ifdef MSL_STRICT
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))

// Library code carries no debug information: an access made here counts for the line that calls it.
#define EMU_INLINE inline __attribute__((always_inline, nodebug))
// Library code that touches simd slots or atomics is not the kernel's memory traffic.
#define EMU_UNTRACED __attribute__((no_sanitize("kernel-address", "alignment", "bounds"), nodebug))

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define M_E_F 2.71828182845904523536f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#ifndef assert
#define assert(x) ((void)0)
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct emu_identity { using type = T; };
template <class T> using emu_same = typename emu_identity<T>::type;  // not deduced
}  // namespace metal
using metal::vec;

// `float4` the type, and `emu_float4` a second name of it: the first becomes a macro in
// msl_constructors.h. A packed vector has the alignment of its element.
#define EMU_VECTORS(T)                                                                            \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                             \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                             \
  typedef T T##4 __attribute__((ext_vector_type(4)));                                             \
  typedef T##2 emu_##T##2;                                                                        \
  typedef T##3 emu_##T##3;                                                                        \
  typedef T##4 emu_##T##4;
#define EMU_PACKED(T)                                                                             \
  struct packed_##T##2 {                                                                          \
    T x, y;                                                                                       \
    packed_##T##2() = default;                                                                    \
    EMU_INLINE packed_##T##2(T ax, T ay) : x(ax), y(ay) {}                                        \
    EMU_INLINE thread T& operator[](uint i) { return (&x)[i]; }                                   \
    EMU_INLINE T operator[](uint i) const { return (&x)[i]; }                                     \
    EMU_INLINE packed_##T##2(T##2 v) : x(v.x), y(v.y) {}                                          \
    EMU_INLINE operator T##2() const { return T##2{x, y}; }                                       \
  };                                                                                              \
  struct packed_##T##3 {                                                                          \
    T x, y, z;                                                                                    \
    packed_##T##3() = default;                                                                    \
    EMU_INLINE packed_##T##3(T ax, T ay, T az) : x(ax), y(ay), z(az) {}                           \
    EMU_INLINE thread T& operator[](uint i) { return (&x)[i]; }                                   \
    EMU_INLINE T operator[](uint i) const { return (&x)[i]; }                                     \
    EMU_INLINE packed_##T##3(T##3 v) : x(v.x), y(v.y), z(v.z) {}                                  \
    EMU_INLINE operator T##3() const { return T##3{x, y, z}; }                                    \
  };                                                                                              \
  struct packed_##T##4 {                                                                          \
    T x, y, z, w;                                                                                 \
    packed_##T##4() = default;                                                                    \
    EMU_INLINE packed_##T##4(T ax, T ay, T az, T aw) : x(ax), y(ay), z(az), w(aw) {}              \
    EMU_INLINE thread T& operator[](uint i) { return (&x)[i]; }                                   \
    EMU_INLINE T operator[](uint i) const { return (&x)[i]; }                                     \
    EMU_INLINE packed_##T##4(T##4 v) : x(v.x), y(v.y), z(v.z), w(v.w) {}                          \
    EMU_INLINE operator T##4() const { return T##4{x, y, z, w}; }                                 \
  };
#define EMU_BOTH(T) EMU_VECTORS(T) EMU_PACKED(T)
EMU_BOTH(char) EMU_BOTH(uchar) EMU_BOTH(short) EMU_BOTH(ushort) EMU_BOTH(int) EMU_BOTH(uint)
EMU_BOTH(half) EMU_BOTH(bfloat) EMU_BOTH(float) EMU_VECTORS(long) EMU_VECTORS(ulong)
// clang's bool vectors have no named swizzles: here a bool vector is what a comparison of int or
// float vectors yields, all bits set where true.
typedef int bool2 __attribute__((ext_vector_type(2)));
typedef int bool3 __attribute__((ext_vector_type(3)));
typedef int bool4 __attribute__((ext_vector_type(4)));
typedef bool2 emu_bool2;
typedef bool3 emu_bool3;
typedef bool4 emu_bool4;

// Lanes and element of a vector type; 0 lanes for a scalar.
template <class T> struct emu_vector {
  static constexpr int lanes = 0;
  using element = T;
};
template <class T, int N> struct emu_vector<T __attribute__((ext_vector_type(N)))> {
  static constexpr int lanes = N;
  using element = T;
};
#define EMU_PACKED_OF(T, N)                                                                       \
  template <> struct emu_vector<packed_##T##N> {                                                  \
    static constexpr int lanes = N;                                                               \
    using element = T;                                                                            \
  };
#define EMU_ALL_PACKED(T) EMU_PACKED_OF(T, 2) EMU_PACKED_OF(T, 3) EMU_PACKED_OF(T, 4)
EMU_ALL_PACKED(char) EMU_ALL_PACKED(uchar) EMU_ALL_PACKED(short) EMU_ALL_PACKED(ushort)
EMU_ALL_PACKED(int) EMU_ALL_PACKED(uint) EMU_ALL_PACKED(half) EMU_ALL_PACKED(bfloat)
EMU_ALL_PACKED(float)

template <int At, class V> EMU_INLINE constexpr void emu_fill(V&) {
  static_assert(At == emu_vector<V>::lanes, "wrong number of components in a vector constructor");
}
template <int At, class V, class A, class... Rest>
EMU_INLINE constexpr void emu_fill(V& v, A a, Rest... rest) {
  using E = typename emu_vector<V>::element;
  constexpr int lanes = emu_vector<A>::lanes;
  if constexpr (lanes == 0) v[At] = E(a);
  else
    for (int i = 0; i < lanes; i++) v[At + i] = E(a[i]);
  emu_fill<At + (lanes ? lanes : 1)>(v, rest...);
}
template <class... A> constexpr bool emu_all_scalars = ((emu_vector<A>::lanes == 0) && ...);
template <class V> EMU_INLINE constexpr V emu_make() { return V{}; }
template <class V, class A> EMU_INLINE constexpr V emu_make(A a) {
  if constexpr (__is_class(A)) {
    return V(a);  // a packed vector
  } else if constexpr (emu_vector<A>::lanes == 0) {
    V v = (typename emu_vector<V>::element)(a);  // a splat
    return v;
  } else {
    return __builtin_convertvector(a, V);
  }
}
template <class V, class A, class B, class... Rest>
EMU_INLINE constexpr V emu_make(A a, B b, Rest... rest) {
  using E = typename emu_vector<V>::element;
  if constexpr (emu_all_scalars<A, B, Rest...>) {  // what a constexpr variable may be made of
    static_assert(2 + sizeof...(Rest) == emu_vector<V>::lanes, "wrong number of components");
    return V{E(a), E(b), E(rest)...};
  } else {
    V v{};
    emu_fill<0>(v, a, b, rest...);
    return v;
  }
}

// static_cast must convert vectors, and half to bfloat, which clang refuses: a function of that name
// (msl_constructors.h) takes its place. Arguments go by value: a vector element has no address.
template <class T> constexpr bool emu_is_reference = false;
template <class T> constexpr bool emu_is_reference<T&> = true;
template <class T> constexpr int emu_half_kind = 0;
template <> constexpr int emu_half_kind<half> = 1;
template <> constexpr int emu_half_kind<bfloat> = 2;
template <bool Condition, class T> struct emu_if {};
template <class T> struct emu_if<true, T> { using type = T; };
template <class To, class A>
EMU_INLINE constexpr typename emu_if<!emu_is_reference<To>, To>::type emu_static_cast(A a) {
  if constexpr (emu_vector<To>::lanes != 0) return emu_make<To>(a);
  else if constexpr (emu_half_kind<To> + emu_half_kind<A> == 3) return static_cast<To>(float(a));
  else return static_cast<To>(a);
}
template <class To, class A>
EMU_INLINE constexpr typename emu_if<emu_is_reference<To>, To>::type emu_static_cast(A& a) {
  return static_cast<To>(a);
}
template <class To, class From> EMU_INLINE constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of equal size");
  return __builtin_bit_cast(To, from);
}
constexpr half operator""h(long double x) { return half(x); }
constexpr half operator""H(long double x) { return half(x); }
#include "msl_constructors.h"
