// mxfp4_rows: four rows of an MXFP4 matrix times x, plus bias, log-softmax over the four.
//   z = W x + b;  y = z - log(sum over the threadgroup's rows of exp z)
// Grid: one threadgroup of 128 for four rows, one simdgroup a row, one lane a block of 32 codes.
// The last threadgroup has rows past the end. A subject of the mutation suite, not of the product.
using namespace metal;

inline float fp4(uint code) {
  float magnitude = float(as_type<half>(ushort((code & 7) << 9)) * 16384.0h);
  return code & 8 ? -magnitude : magnitude;
}
// For mutants: a helper of one address space, one that writes an array of the thread, a table.
inline float first(const device float* p) { return p[0]; }
inline void fill(thread float* p, uint n) {
  for (uint i = 0; i < n; i++) p[i] = 0;
}
constant float NONE[4] = {0, 0, 0, 0};

kernel void mxfp4_rows(const device uint* w [[buffer(0)]], const device uchar* scales [[buffer(1)]],
                       const device float* x [[buffer(2)]], const device float* bias [[buffer(3)]],
                       device float* y [[buffer(4)]], constant uint& rows [[buffer(5)]],
                       constant uint& columns [[buffer(6)]],
                       uint group [[threadgroup_position_in_grid]],
                       uint tid [[thread_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float shared[1312];
  threadgroup float part[32];
  threadgroup float total[1];
  for (uint i = tid; i < columns; i += 128) shared[i] = x[i];
  if (simdgroup == 0) part[lane] = -INFINITY;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // A

  const uint row = group * 4 + simdgroup;
  const uint at = min(row, rows - 1);
  const uint blocks = columns / 32;
  float sum = 0;
  for (uint b = lane; b < blocks; b += 32) {
    uint4 codes = *(const device uint4*)(w + (at * blocks + b) * 4);
    float scale = as_type<float>(uint(scales[at * blocks + b]) << 23);
    float partial = 0;
    for (uint q = 0; q < 32; q++)
      partial += fp4(codes[q / 8] >> 4 * (q % 8) & 15) * shared[b * 32 + q];
    sum += partial * scale;
  }
  for (ushort distance = 16; distance; distance /= 2) sum += simd_shuffle_xor(sum, distance);
  if (lane == 0) part[simdgroup] = row < rows ? sum + bias[row] : -INFINITY;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // B

  if (simdgroup == 0) {
    float most = simd_max(part[lane]);
    float all = simd_sum(fast::exp(part[lane] - most));
    if (lane == 0) total[0] = most + fast::log(all);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // C
  if (lane == 0 && row < rows) y[row] = part[simdgroup] - total[0];
}
