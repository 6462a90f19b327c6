// Rows of a weight matrix times vectors, each weight read once for R of them.
//
// A lane owns 32 columns. COLS columns make COLS / 32 lanes, cut evenly over Split<COLS>::groups simdgroups:
// 2880 = 3 x 30 lanes, 4096 = 4 x 32. The lane reads its columns of a row in 16-byte loads, neighbouring lanes
// neighbouring loads, so a row is read once and whole. Idle lanes (30, 31) repeat a load and multiply by 0.
//
// A product is added along the columns of a lane, then over lanes, then over simdgroups, in the same order for any R:
// a vector's result has the same bits alone and in company.
#pragma once
#include "simd.h"

template <int COLS>
struct Split {
  static constant constexpr int groups = (COLS / 32 + 31) / 32;
  static constant constexpr int lanes = COLS / 32 / groups;
  static_assert(COLS % 32 == 0 && COLS / 32 % groups == 0, "columns must fill whole simdgroups");
};

// Weights stored as they are.
template <typename W, int COLS>
struct Plain {
  static constant constexpr int per_load = 16 / sizeof(W), loads = 32 / per_load, columns = COLS;
  const device W* weight;
  struct Load {
    uint4 bits;
  };
  METAL_FUNC void read(uint row, uint where, thread Load& out) const {
    out.bits = ((const device uint4*)weight)[row * (COLS / per_load) + where];
  }
  static METAL_FUNC void unpack(thread const Load& from, thread float* values) {
    Packed<W>::unpack(from.bits, values);
  }
  // total + the products of a load with its columns of a vector, whose sum is not needed here
  static METAL_FUNC float add(thread const Load& from, thread const float* x, float, float total) {
    float w[per_load];
    Packed<W>::unpack(from.bits, w);
    UNROLL for (int j = 0; j < per_load; j++) total = fma(w[j], x[j], total);
    return total;
  }
};

// MLX affine codes: w = scale * code + bias, one scale and bias of type S for 64 columns.
template <typename S, int BITS, int COLS>
struct Affine {
  static constant constexpr int per_load = 128 / BITS, loads = 32 / per_load, columns = COLS;
  const device uint* weight;
  const device S* scales;
  const device S* biases;
  struct Load {
    uint4 bits;
    float scale, bias;
  };
  METAL_FUNC void read(uint row, uint where, thread Load& out) const {
    const uint group = row * (COLS / 64) + where * per_load / 64;
    out.bits = ((const device uint4*)weight)[row * (COLS / per_load) + where];
    out.scale = float(scales[group]);
    out.bias = float(biases[group]);
  }
  static METAL_FUNC float code(uint4 bits, int j) {
    return float((bits[j * BITS / 32] >> (j * BITS % 32)) & ((1u << BITS) - 1));
  }
  static METAL_FUNC void unpack(thread const Load& from, thread float* values) {
    UNROLL for (int j = 0; j < per_load; j++) values[j] = fma(from.scale, code(from.bits, j), from.bias);
  }
  // total + the products of a load with its columns of a vector; sum is those columns' sum
  static METAL_FUNC float add(thread const Load& from, thread const float* x, float sum, float total) {
    float part = 0;
    UNROLL for (int j = 0; j < per_load; j++) part = fma(code(from.bits, j), x[j], part);
    return fma(from.scale, part, fma(from.bias, sum, total));
  }
};

// The first load of this lane in a row; load i follows i * Split::lanes later.
template <typename F>
METAL_FUNC uint first_load(uint group, uint lane) {
  return group * Split<F::columns>::lanes * F::loads + min(lane, uint(Split<F::columns>::lanes - 1));
}

// What multiplies a vector before the product; the factor 1 / sqrt(mean + eps) of a norm is the same for all
// columns, so it multiplies the finished product.
struct Unnormed {
  template <int COUNT>
  METAL_FUNC void load_scales(uint, thread float* scales) const {
    UNROLL for (int j = 0; j < COUNT; j++) scales[j] = 1;
  }
};
template <typename N>
struct Normed {
  const device N* norm;
  template <int COUNT>
  METAL_FUNC void load_scales(uint column, thread float* scales) const {
    load<COUNT>(norm + column, scales);
  }
};

// This lane's 32 columns of R vectors: first..first+R-1 of x (B,columns), the last one repeated past the end.
// Two fill 64 of a thread's 128 registers; a third would leave too few for the weights in flight.
template <int R, typename F>
struct Vectors {
  float values[R][32], sums[R][F::loads], squares[R];

  template <typename T, typename X>
  METAL_FUNC void stage(const device T* x, X norm, uint first, uint batch, uint at, uint lane) {
    constexpr int count = F::per_load;
    static_assert(count * sizeof(T) % 16 == 0, "the vector type must not be narrower than the weights");
    UNROLL for (int i = 0; i < F::loads; i++) {
      const uint column = (at + i * Split<F::columns>::lanes) * count;
      float scales[count];
      norm.template load_scales<count>(column, scales);
      UNROLL for (int r = 0; r < R; r++) {
        const uint vector = R == 1 ? first : min(first + r, batch - 1);
        thread float* v = values[r] + i * count;
        load<count>(x + vector * F::columns + column, v);
        if (lane >= uint(Split<F::columns>::lanes)) { UNROLL for (int j = 0; j < count; j++) v[j] = 0; }
        if (i == 0) squares[r] = 0;
        sums[r][i] = 0;
        UNROLL for (int j = 0; j < count; j++) {
          squares[r] = fma(v[j], v[j], squares[r]);
          v[j] *= scales[j];
          sums[r][i] += v[j];
        }
      }
    }
  }

  // The columns of vector r times `scale`, rounded, to a row of T; for lanes that have columns of their own.
  template <typename T>
  METAL_FUNC void store(int r, device T* row, float scale, uint at) const {
    UNROLL for (int i = 0; i < F::loads; i++) {
      const uint column = (at + i * Split<F::columns>::lanes) * F::per_load;
      UNROLL for (int j = 0; j < F::per_load; j += 4) {
        thread const float* v = values[r] + i * F::per_load + j;
        store4(row + column + j, v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale);
      }
    }
  }
};

// This lane's share of the products of one row with each vector.
template <int R, typename F>
METAL_FUNC void dot(thread const typename F::Load* row, thread const Vectors<R, F>& x, thread float* out, int stride) {
  UNROLL for (int r = 0; r < R; r++) {
    float total = 0;
    UNROLL for (int i = 0; i < F::loads; i++) total = F::add(row[i], x.values[r] + i * F::per_load, x.sums[r][i], total);
    out[r * stride] = total;
  }
}

// Products of 16 rows with each vector over this simdgroup's columns, to out[vector * stride + 0..15]: rows
// row..row+7 and row+HIGH..row+HIGH+7, 4 in flight (2 for two vectors). `sum16` adds 16 rows of one vector, or 8 rows of two.
template <int HIGH, int R, typename F>
METAL_FUNC void dot16(
    thread const F& weight, uint row, uint at, uint lane, thread const Vectors<R, F>& x, threadgroup float* out, uint stride) {
  constexpr int rows = 16 / R, flight = R > 1 ? 2 : 4;
  for (int from = 0; from < 16; from += rows, row += HIGH) {
    float sums[16];
    UNROLL for (int first = 0; first < rows; first += flight) {
      typename F::Load loads[flight][F::loads];
      UNROLL for (int k = 0; k < flight; k++) {
        const int n = first + k;
        UNROLL for (int i = 0; i < F::loads; i++)
          weight.read(row + n % 8 + n / 8 * HIGH, at + i * Split<F::columns>::lanes, loads[k][i]);
      }
      UNROLL for (int k = 0; k < flight; k++) dot<R, F>(loads[k], x, sums + first + k, rows);
    }
    const float total = sum16(sums, lane);
    const uint n = lane / 2;
    if (lane % 2 == 0) out[n / rows * stride + from + n % rows] = total;
  }
}
