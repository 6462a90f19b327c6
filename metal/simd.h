// What every kernel shares: unrolled loops, sums over a simdgroup, and 16-byte loads.
#pragma once

// Without it, arrays that a loop indexes stay in memory instead of registers.
#define UNROLL _Pragma("clang loop unroll(full)")

// Halves a list of 2 * HALF sums: a lane keeps one half and gives the other to its partner lane.
template <int HALF>
METAL_FUNC void fold(thread float* sums, uint lane) {
  const bool upper = lane & (2 * HALF);
  UNROLL for (int i = 0; i < HALF; i++) {
    const float low = sums[i], high = sums[i + HALF];  // two loads first: see `give`
    const float give = upper ? low : high, keep = upper ? high : low;
    sums[i] = keep + simd_shuffle_xor(give, ushort(2 * HALF));
  }
}

// Sums 16 values over the 32 lanes with 16 shuffles instead of 80; lane l returns the sum of value l / 2.
METAL_FUNC float sum16(thread float* sums, uint lane) {
  fold<8>(sums, lane);
  fold<4>(sums, lane);
  fold<2>(sums, lane);
  fold<1>(sums, lane);
  return sums[0] + simd_shuffle_xor(sums[0], ushort(1));
}

// 16 bytes of T as floats. bfloat is never computed with: its bits are the top half of a float.
template <typename T>
struct Packed;
template <>
struct Packed<float> {
  static METAL_FUNC void unpack(uint4 bits, thread float* values) {
    UNROLL for (int i = 0; i < 4; i++) values[i] = as_type<float>(bits[i]);
  }
};
template <>
struct Packed<half> {
  static METAL_FUNC void unpack(uint4 bits, thread float* values) {
    UNROLL for (int i = 0; i < 4; i++) {
      const half2 pair = as_type<half2>(bits[i]);
      values[2 * i] = float(pair.x);
      values[2 * i + 1] = float(pair.y);
    }
  }
};
template <>
struct Packed<bfloat> {
  static METAL_FUNC void unpack(uint4 bits, thread float* values) {
    UNROLL for (int i = 0; i < 4; i++) {
      values[2 * i] = as_type<float>(bits[i] << 16);
      values[2 * i + 1] = as_type<float>(bits[i] & 0xFFFF0000u);
    }
  }
};

// COUNT consecutive values as floats; `from` must be 16-byte aligned.
template <int COUNT, typename T>
METAL_FUNC void load(const device T* from, thread float* values) {
  constexpr int each = 16 / sizeof(T);
  UNROLL for (int i = 0; i < COUNT / each; i++)
    Packed<T>::unpack(((const device uint4*)from)[i], values + i * each);
}

// Four values, rounded, to consecutive places; `to` must be aligned to all of them.
template <typename T>
METAL_FUNC void store4(device T* to, float a, float b, float c, float d) {
  vec<T, 4> four;
  four.x = T(a);
  four.y = T(b);
  four.z = T(c);
  four.w = T(d);
  *(device vec<T, 4>*)to = four;
}
