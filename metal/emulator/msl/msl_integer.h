// <metal_integer>. Templates over the exact type, so that no argument is narrowed on the way in: an
// overload on uint alone would take a ulong and answer for its lower half.
#pragma once
namespace metal {
#define EMU_INTEGER template <class T, class = enable_if_t<is_integral_v<T>>> EMU_INLINE T
template <class T> constexpr uint emu_bits = sizeof(T) * 8;
template <class T> constexpr ulong emu_mask = emu_bits<T> == 64 ? ~0ul : (1ul << (emu_bits<T> % 64)) - 1;
// The bits of a signed or unsigned value, zero-extended.
template <class T> EMU_INLINE ulong emu_zero_extend(T x) { return ulong(x) & emu_mask<T>; }

EMU_INTEGER popcount(T x) { return T(__builtin_popcountl(emu_zero_extend(x))); }
EMU_INTEGER clz(T x) {
  ulong bits = emu_zero_extend(x);
  return T(bits ? __builtin_clzl(bits) - (64 - emu_bits<T>) : emu_bits<T>);
}
EMU_INTEGER ctz(T x) {
  ulong bits = emu_zero_extend(x);
  return T(bits ? __builtin_ctzl(bits) : emu_bits<T>);
}
EMU_INTEGER reverse_bits(T x) {
  return T(__builtin_bitreverse64(emu_zero_extend(x)) >> (64 - emu_bits<T>));
}
EMU_INTEGER rotate(T x, emu_same<T> count) {
  ulong bits = emu_zero_extend(x), k = ulong(count) % emu_bits<T>;
  return T(k ? bits << k | bits >> (emu_bits<T> - k) : bits);
}
EMU_INTEGER extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) return T(0);
  ulong field = emu_zero_extend(x) >> offset & (bits >= 64 ? ~0ul : (1ul << bits) - 1);
  bool negative = is_signed_v<T> && (field >> (bits - 1) & 1);
  return T(negative && bits < 64 ? field | ~0ul << bits : field);
}
EMU_INTEGER insert_bits(T base, emu_same<T> insert, uint offset, uint bits) {
  ulong mask = (bits >= 64 ? ~0ul : (1ul << bits) - 1) << offset;
  return T((ulong(base) & ~mask) | (ulong(insert) << offset & mask));
}
EMU_INTEGER abs(T x) { return x < T(0) ? T(-x) : x; }
EMU_INTEGER absdiff(T a, emu_same<T> b) { return a < b ? T(b - a) : T(a - b); }
EMU_INTEGER addsat(T a, emu_same<T> b) {
  T sum;
  if (!__builtin_add_overflow(a, b, &sum)) return sum;
  return b < T(0) ? numeric_limits<T>::min() : numeric_limits<T>::max();
}
EMU_INTEGER subsat(T a, emu_same<T> b) {
  T difference;
  if (!__builtin_sub_overflow(a, b, &difference)) return difference;
  return is_unsigned_v<T> || b > T(0) ? numeric_limits<T>::min() : numeric_limits<T>::max();
}
EMU_INTEGER hadd(T a, emu_same<T> b) { return T((a & b) + ((a ^ b) >> 1)); }
EMU_INTEGER rhadd(T a, emu_same<T> b) { return T((a | b) - ((a ^ b) >> 1)); }
EMU_INTEGER mulhi(T a, emu_same<T> b) {
  if constexpr (is_signed_v<T>) return T((__int128)a * b >> emu_bits<T>);
  else return T((unsigned __int128)a * b >> emu_bits<T>);
}
EMU_INTEGER madhi(T a, emu_same<T> b, emu_same<T> c) { return T(mulhi(a, b) + c); }
EMU_INTEGER mul24(T a, emu_same<T> b) { return T(a * b); }
EMU_INTEGER mad24(T a, emu_same<T> b, emu_same<T> c) { return T(a * b + c); }

#define EMU_INTEGER_VECTOR_1(name)                                                                \
  template <class T, int N, class = enable_if_t<is_integral_v<T>>>                                \
  EMU_INLINE vec<T, N> name(vec<T, N> v) {                                                        \
    vec<T, N> r;                                                                                  \
    for (int i = 0; i < N; i++) r[i] = name(T(v[i]));                                             \
    return r;                                                                                     \
  }
EMU_INTEGER_VECTOR_1(popcount) EMU_INTEGER_VECTOR_1(clz) EMU_INTEGER_VECTOR_1(ctz)
EMU_INTEGER_VECTOR_1(reverse_bits)
template <class T, int N> EMU_INLINE vec<T, N> abs(vec<T, N> v) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = abs(T(v[i]));
  return r;
}
EMU_ELEMENTWISE_2(absdiff) EMU_ELEMENTWISE_2(addsat) EMU_ELEMENTWISE_2(subsat)
EMU_ELEMENTWISE_2(hadd) EMU_ELEMENTWISE_2(rhadd) EMU_ELEMENTWISE_2(rotate)
EMU_ELEMENTWISE_2(mulhi) EMU_ELEMENTWISE_3(mad24)
}  // namespace metal
