// scan: running sums of x within a threadgroup of 256, their differences, and the sum of all.
//   sums  x from the threadgroup's first up to this one      back  sums in reverse order
//   steps  differences of neighbouring sums, x again         total  sum of all x
// Uses what mxfp4_rows does not: prefix sums, simdgroup barriers, atomics, device memory as a
// means of communication. A subject of the mutation suite, not of the product.
using namespace metal;

kernel void scan(const device uint* x [[buffer(0)]], device uint* sums [[buffer(1)]],
                 device uint* back [[buffer(2)]], device uint* steps [[buffer(3)]],
                 device atomic_uint* total [[buffer(4)]], uint i [[thread_position_in_grid]],
                 uint tid [[thread_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint last[8];
  threadgroup uint line[256];
  uint value = x[i];
  uint sum = simd_prefix_inclusive_sum(value);

  line[tid] = sum;
  simdgroup_barrier(mem_flags::mem_threadgroup);  // A
  steps[i] = lane == 0 ? sum : sum - line[tid - 1];

  if (lane == 31) last[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // B
  for (uint k = 0; k < simdgroup; k++) sum += last[k];
  line[255 - tid] = value;  // reuses memory that others read before B
  sums[i] = sum;
  threadgroup_barrier(mem_flags::mem_device);  // C
  back[i] = sums[i - tid + 255 - tid];

  uint all = simd_sum(value);
  if (lane == 0) atomic_fetch_add_explicit(total, all, memory_order_relaxed);
}
