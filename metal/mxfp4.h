// MXFP4: blocks of 32 four-bit codes (sign, 2 exponent bits, 1 mantissa bit) with one scale 2^(byte - 127).
#pragma once
#include "simd.h"

// How the 32 vector values of a block are kept: halves hold what bfloat and half activations need (see
// `Requires` of the kernels) in 16 registers; float activations keep their 24 bits.
template <typename T>
struct Pair {
  typedef half2 type;
  static METAL_FUNC half2 of(float a, float b) { return half2(half(a), half(b)); }
};
template <>
struct Pair<float> {
  typedef float2 type;
  static METAL_FUNC float2 of(float a, float b) { return float2(a, b); }
};

// 8 codes of a word as 4 pairs of halves times 2^-14: pairs (0,4), (2,6), (1,5), (3,7).
// Per byte, code s eem is moved to bits 1-4 (eem shifted by one, s at bit 4). Adding 0x70 lets the carry of
// s (bit 4) run through bits 4-6 into bit 7, where a half has its sign; masking with 0x8E keeps s and eem,
// which then sit where the top byte of a half has its sign, its two lowest exponent bits and its top mantissa
// bit. Exponent 0 is a subnormal half, so 0.5 comes out right without a special case.
METAL_FUNC void decode(uint word, thread half2* pairs) {
  const uint even = (((word + word) & 0x1E1E1E1Eu) + 0x70707070u) & 0x8E8E8E8Eu;   // codes 0 2 4 6
  const uint odd = (((word >> 3) & 0x1E1E1E1Eu) + 0x70707070u) & 0x8E8E8E8Eu;  // codes 1 3 5 7
  pairs[0] = as_type<half2>((even << 8) & 0xFF00FF00u);
  pairs[1] = as_type<half2>(even & 0xFF00FF00u);
  pairs[2] = as_type<half2>((odd << 8) & 0xFF00FF00u);
  pairs[3] = as_type<half2>(odd & 0xFF00FF00u);
}

// 32 vector values in the order of `decode`.
template <typename T>
METAL_FUNC void stage_block(const device T* x, thread typename Pair<T>::type* pairs) {
  UNROLL for (int word = 0; word < 4; word++) {
    float v[8];
    load<8>(x + 8 * word, v);
    pairs[4 * word] = Pair<T>::of(v[0], v[4]);
    pairs[4 * word + 1] = Pair<T>::of(v[2], v[6]);
    pairs[4 * word + 2] = Pair<T>::of(v[1], v[5]);
    pairs[4 * word + 3] = Pair<T>::of(v[3], v[7]);
  }
}

// For each of R vectors, the sum of the 32 products, times 2^-14; the order of the additions does not depend on R.
template <int R, typename P>
METAL_FUNC void dot_block(uint4 codes, thread P (*x)[16], thread float* totals) {
  UNROLL for (int r = 0; r < R; r++) totals[r] = 0;
  UNROLL for (int word = 0; word < 4; word++) {
    half2 w[4];
    decode(codes[word], w);
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int i = 0; i < 4; i++) {
        totals[r] = fma(float(w[i].x), float(x[r][4 * word + i].x), totals[r]);
        totals[r] = fma(float(w[i].y), float(x[r][4 * word + i].y), totals[r]);
      }
    }
  }
}
template <typename P>
METAL_FUNC float dot_block(uint4 codes, thread P (&x)[16]) {
  float total;
  dot_block<1>(codes, &x, &total);
  return total;
}

// The factor of a block: its power of two, and the 2^14 that `decode` leaves out.
METAL_FUNC float block_scale(uchar exponent) { return as_type<float>(uint(exponent) << 23); }
constant constexpr float DECODE_SCALE = 16384.0f;
