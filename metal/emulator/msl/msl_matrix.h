// <metal_simdgroup_matrix>: 8x8 matrices, two elements a lane.
//
// Apple does not document which lane holds which element. The map here is the one MLX's kernels are
// written for (mlx/backend/metal/kernels/steel/gemm/mma.h, get_coord, MIT): lane l holds row
// (l/4 & 4) + (l/2 % 4) and columns c, c + 1 with c = 2 (l/4 & 2) + 2 (l % 2).
#pragma once
namespace metal {
EMU_INLINE uint emu_matrix_row(uint lane) { return (lane / 4 & 4) + (lane / 2 & 3); }
EMU_INLINE uint emu_matrix_column(uint lane) { return (lane / 4 & 2) * 2 + (lane & 1) * 2; }
// The lane that holds (row, column): the two functions above, inverted.
EMU_INLINE uint emu_matrix_lane(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2;
}

template <class T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8x8 simdgroup matrices only");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  EMU_INLINE explicit simdgroup_matrix(T v) { elements = v; }
  EMU_INLINE thread vec<T, 2>& thread_elements() { return elements; }
  EMU_INLINE const thread vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int Rows, int Columns>
EMU_INLINE simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, Rows, Columns>(v);
}

#define EMU_MATRIX_MEMORY(space)                                                                  \
  template <class T>                                                                              \
  EMU_INLINE void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const space T* source,      \
                                 ulong stride = 8, ulong2 origin = 0ul, bool transpose = false) { \
    ulong r = emu_matrix_row(emu_lane()), c = emu_matrix_column(emu_lane());                      \
    ulong down = transpose ? 1 : stride, across = transpose ? stride : 1;                         \
    source += origin.y * stride + origin.x + r * down + c * across;                               \
    d.elements[0] = source[0];                                                                    \
    d.elements[1] = source[across];                                                               \
  }                                                                                               \
  template <class T>                                                                              \
  EMU_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> d, space T* target, ulong stride = 8, \
                                  ulong2 origin = 0ul, bool transpose = false) {                  \
    ulong r = emu_matrix_row(emu_lane()), c = emu_matrix_column(emu_lane());                      \
    ulong down = transpose ? 1 : stride, across = transpose ? stride : 1;                         \
    target += origin.y * stride + origin.x + r * down + c * across;                               \
    target[0] = d.elements[0];                                                                    \
    target[across] = d.elements[1];                                                               \
  }
#ifdef MSL_STRICT
EMU_MATRIX_MEMORY(device) EMU_MATRIX_MEMORY(threadgroup)
#else
EMU_MATRIX_MEMORY()
#endif

template <class A, class B> struct EmuFactors {
  vec<A, 2> a;
  vec<B, 2> b;
};
template <class D, class A, class B, class C>
EMU_SIMD_BODY simdgroup_matrix<D, 8, 8> emu_multiply_accumulate(simdgroup_matrix<A, 8, 8> a,
                                                                simdgroup_matrix<B, 8, 8> b,
                                                                simdgroup_matrix<C, 8, 8> c,
                                                                EmuSite site) {
  EmuFactors<A, B> mine{a.elements, b.elements};
  EmuDeposits<EmuFactors<A, B>> all = emu_exchange(EMU_MATRIX, mine, site);
  uint row = emu_matrix_row(emu_lane()), column = emu_matrix_column(emu_lane());
  float sum[2] = {float(c.elements[0]), float(c.elements[1])};
  for (uint k = 0; k < 8; k++) {
    vec<A, 2> left = all.at(emu_matrix_lane(row, k)).a;
    vec<B, 2> right = all.at(emu_matrix_lane(k, column)).b;
    for (int i = 0; i < 2; i++) sum[i] += float(left[k & 1]) * float(right[i]);
  }
  simdgroup_matrix<D, 8, 8> d;
  d.elements[0] = D(sum[0]);
  d.elements[1] = D(sum[1]);
  return d;
}
template <class D, class A, class B, class C>
EMU_SIMD void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                            simdgroup_matrix<A, 8, 8> a,
                                            simdgroup_matrix<B, 8, 8> b,
                                            simdgroup_matrix<C, 8, 8> c, EMU_HERE) {
  d = emu_multiply_accumulate<D>(a, b, c, site);
}
template <class D, class A, class B>
EMU_SIMD void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                 simdgroup_matrix<B, 8, 8> b, EMU_HERE) {
  d = emu_multiply_accumulate<D>(a, b, simdgroup_matrix<D, 8, 8>(D(0)), site);
}
}  // namespace metal
