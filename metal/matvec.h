// Rows of a weight matrix times a vector that stays in registers.
//
// A lane owns 32 columns. COLS columns make COLS / 32 lanes, cut evenly over Split<COLS>::groups simdgroups:
// 2880 = 3 x 30 lanes, 4096 = 4 x 32. The lane reads its columns of a row in 16-byte loads, neighbouring lanes
// neighbouring loads, so a row is read once and whole. Idle lanes (30, 31) repeat a load and multiply by 0.
#pragma once
#include "simd.h"

template <int COLS>
struct Split {
  static constant constexpr int groups = (COLS / 32 + 31) / 32;
  static constant constexpr int lanes = COLS / 32 / groups;
  static_assert(COLS % 32 == 0 && COLS / 32 % groups == 0, "columns must fill whole simdgroups");
};

// The 32 vector values of a lane, in the order of its loads, and their sum for each load.
template <typename F>
struct Lane {
  float x[32];
  float sum[F::loads];
};

// Weights stored as they are.
template <typename W, int COLS>
struct Plain {
  static constant constexpr int per_load = 16 / sizeof(W), loads = 32 / per_load, columns = COLS;
  const device W* weight;
  struct Row {
    uint4 bits[loads];
  };
  METAL_FUNC void read(uint row, uint at, thread Row& out) const {
    const device uint4* from = (const device uint4*)weight + row * (COLS / per_load) + at;
    UNROLL for (int i = 0; i < loads; i++) out.bits[i] = from[i * Split<COLS>::lanes];
  }
  static METAL_FUNC void unpack(thread const Row& row, int i, thread float* values) {
    Packed<W>::unpack(row.bits[i], values);
  }
  METAL_FUNC float dot(thread const Row& row, thread const Lane<Plain>& lane) const {
    float total = 0;
    UNROLL for (int i = 0; i < loads; i++) {
      float w[per_load];
      Packed<W>::unpack(row.bits[i], w);
      UNROLL for (int j = 0; j < per_load; j++) total = fma(w[j], lane.x[i * per_load + j], total);
    }
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
  struct Row {
    uint4 bits[loads];
    float scale[loads], bias[loads];
  };
  METAL_FUNC void read(uint row, uint at, thread Row& out) const {
    UNROLL for (int i = 0; i < loads; i++) {
      const uint where = at + i * Split<COLS>::lanes, group = row * (COLS / 64) + where * per_load / 64;
      out.bits[i] = ((const device uint4*)weight)[row * (COLS / per_load) + where];
      out.scale[i] = float(scales[group]);
      out.bias[i] = float(biases[group]);
    }
  }
  static METAL_FUNC float code(uint4 bits, int j) {
    return float((bits[j * BITS / 32] >> (j * BITS % 32)) & ((1u << BITS) - 1));
  }
  static METAL_FUNC void unpack(thread const Row& row, int i, thread float* values) {
    UNROLL for (int j = 0; j < per_load; j++) values[j] = fma(row.scale[i], code(row.bits[i], j), row.bias[i]);
  }
  METAL_FUNC float dot(thread const Row& row, thread const Lane<Affine>& lane) const {
    float total = 0;
    UNROLL for (int i = 0; i < loads; i++) {
      float part = 0;
      UNROLL for (int j = 0; j < per_load; j++) part = fma(code(row.bits[i], j), lane.x[i * per_load + j], part);
      total = fma(row.scale[i], part, fma(row.bias[i], lane.sum[i], total));
    }
    return total;
  }
};

// The first load of this lane in a row; load i follows i * Split::lanes later.
template <typename F>
METAL_FUNC uint first_load(uint group, uint lane) {
  return group * Split<F::columns>::lanes * F::loads + min(lane, uint(Split<F::columns>::lanes - 1));
}

// Reads the lane's 32 values of the vector; idle lanes get zeros.
template <typename F, typename T>
METAL_FUNC void stage(const device T* x, uint at, uint lane, thread Lane<F>& out) {
  static_assert(F::per_load * sizeof(T) % 16 == 0, "the vector type must not be narrower than the weights");
  UNROLL for (int i = 0; i < F::loads; i++)
    load<F::per_load>(x + (at + i * Split<F::columns>::lanes) * F::per_load, out.x + i * F::per_load);
  if (lane >= uint(Split<F::columns>::lanes)) { UNROLL for (int i = 0; i < 32; i++) out.x[i] = 0; }
}

template <typename F>
METAL_FUNC void sum_loads(thread Lane<F>& out) {
  UNROLL for (int i = 0; i < F::loads; i++) {
    out.sum[i] = 0;
    UNROLL for (int j = 0; j < F::per_load; j++) out.sum[i] += out.x[i * F::per_load + j];
  }
}

// Stages x * norm and returns this lane's share of the sum of squares of x. The factor
// 1 / sqrt(mean + eps) is the same for all columns, so it multiplies the finished dot product.
template <typename F, typename T, typename N>
METAL_FUNC float stage_normed(const device T* x, const device N* norm, uint at, uint lane, thread Lane<F>& out) {
  float squares = 0;
  stage<F>(x, at, lane, out);
  UNROLL for (int i = 0; i < F::loads; i++) {
    float scale[F::per_load];
    load<F::per_load>(norm + (at + i * Split<F::columns>::lanes) * F::per_load, scale);
    UNROLL for (int j = 0; j < F::per_load; j++) {
      thread float& value = out.x[i * F::per_load + j];
      squares = fma(value, value, squares);
      value *= scale[j];
    }
  }
  sum_loads<F>(out);
  return squares;
}

// 16 dot products over this simdgroup's columns: rows row..row+7 and row+HIGH..row+HIGH+7, 4 rows in flight.
// Lane l returns the sum for the (l / 2)-th of them.
template <int HIGH, typename F>
METAL_FUNC float dot16(thread const F& weight, uint row, uint at, uint lane, thread const Lane<F>& x) {
  float sums[16];
  UNROLL for (int first = 0; first < 16; first += 4) {
    typename F::Row rows[4];
    UNROLL for (int i = 0; i < 4; i++) weight.read(row + (first + i) % 8 + (first + i) / 8 * HIGH, at, rows[i]);
    UNROLL for (int i = 0; i < 4; i++) sums[first + i] = weight.dot(rows[i], x);
  }
  return sum16(sums, lane);
}
