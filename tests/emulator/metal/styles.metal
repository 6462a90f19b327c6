// Ways of writing Metal that other projects have and ours does not.
#include <metal_stdlib>
using namespace metal;

struct Sizes {
  int columns;
  packed_float3 tint;
};
constexpr constant half2 bias = half2(0.5h, -0.5h);
constant uint skipped [[function_constant(0)]];
constant uint first = is_function_constant_defined(skipped) ? skipped : 1;

template <typename T, short Step>
kernel void tinted(constant Sizes& sizes [[buffer(0)]], device const packed_float3* x [[buffer(1)]],
                   device T* y [[buffer(2)]], threadgroup char* memory [[threadgroup(0)]],
                   uint2 at [[thread_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float* row = (threadgroup float*)memory;
  packed_float3 p = x[at.y * sizes.columns + at.x];
  float3 tint = float3(sizes.tint);
  row[lane] = dot(float3(p), tint) + p[Step] + float(bias.y) + packed_float3(1, 2, 3).z;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[at.y * sizes.columns + at.x] = T(row[(lane + first) % sizes.columns]);
}
typedef decltype(tinted<float, 1>) tinted_t;
template [[host_name("tinted_f32")]] kernel tinted_t tinted<float, 1>;
template [[ host_name("tinted_f16") ]] [[kernel]] decltype(tinted<half, 1>) tinted<half, 1>;
template [[host_name("tinted_last")]] kernel void tinted<float, 2>(
    constant Sizes&, device const packed_float3*, device float*, threadgroup char*, uint2, ushort);
