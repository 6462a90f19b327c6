// sample_filtered: sample_token among the tokens that top-k, top-p and min-p leave, found without sorting.
//   token = the kept v of largest logits[v] / temperature + noise, ties to the lower id; logprob as in sample_token
//   kept, with tokens in the order of falling logit, then rising id, and p = softmax(allowed logits):
//   the first k;  of these, while the mass before them is < top_p of theirs;  of these, logit >= max + log(min_p)
// Inputs:    best (B,TILES,4) f32 from unembed: m and sum in columns 2 and 3; logits (B,V) f32; allowed (B,V/32) u32,
//            as there; control (B,8) i32: position, base, slot, seed low, seed high;
//            sampling (B,8) f32: temperature, top-k (0: off), top-p (1: off), min-p (0: off)
// Output:    token (B,) i32; logprob (B,) f32, of temperature 1; next (B,8) i32: control with position + 1, slot + 1
// Grid:      B threadgroups of 16 simdgroups. A filter takes 3 passes over the logits, each a histogram of 2048 bins, in
//            one core: 3 x 800 KB out of the cache, beside gigabytes of weights; more groups would need a dispatch a pass.
// Numerics:  float32; a token's place is its distance from the best in steps of 2^-25, a mass is a multiple of 2^-31:
//            whole numbers, whose sums have no order. The first bins are 1/16 of a nat wide.
// Requires:  V % 64 == 0, V < 2^22; a token that may be chosen; shapes are checked in kernels.sample_filtered.
// Used when: a row of the batch has a filter; rows without one get the token that sample_token gives them.
// Not fused: with unembed: no threadgroup of it sees all logits.
// Source:    our own; selection by digits after Alabi et al., Fast k-selection algorithms for GPUs (2012).
#include "gumbel.h"
#include "simd.h"

constant constexpr uint THREADS = 512, GROUPS = THREADS / 32, BINS = 2048;

// One row's logits, and which of them are still kept.
struct Row {
  const device float* logits;
  const device uint* allowed;
  float high, total;  // of the allowed logits: the maximum, sum exp(logit - high)
  ulong last;         // the place of the last token kept

  METAL_FUNC uint distance(uint v) const { return uint(min(high - logits[v], 127.0f) * 33554432.0f); }
  static METAL_FUNC ulong place(uint distance, uint v) { return ulong(distance) << 23 | v; }
  METAL_FUNC uint mass(uint distance) const {
    return uint(metal::exp(float(distance) * -2.9802322387695312e-8f) / total * 2147483648.0f + 0.5f);
  }
  METAL_FUNC bool keeps(uint v) const { return (allowed[v / 32] >> v % 32 & 1) && place(distance(v), v) <= last; }
};

// The sum over the threadgroup, the same in every thread; and the sum of the threads before this one.
METAL_FUNC uint sum_before(uint value, threadgroup uint* sums, uint lane, uint group, thread uint& total) {
  uint before = simd_prefix_exclusive_sum(value);
  if (lane == 31) sums[group] = before + value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  total = 0;
  for (uint g = 0; g < GROUPS; g++) {
    before += g < group ? sums[g] : 0;
    total += sums[g];
  }
  return before;
}

// Keeps tokens while the weight before them, a count or a mass, is below `limit`, or below `share` of all. Digit by
// digit of 11 bits finds the place at which the weight reaches the limit, the last one that is kept; the first three
// digits are the distance's.
template <int V, bool MASS>
METAL_FUNC ulong keep_first(
    Row row, uint limit, float share, threadgroup uint* bins, threadgroup uint* sums, uint thread_id,
    uint lane, uint group) {
  ulong place = 0;
  for (int shift = 44; shift >= 0; shift -= 11) {
    for (uint bin = thread_id; bin < BINS; bin += THREADS) bins[bin] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint v = thread_id; v < V; v += THREADS) {
      if (!row.keeps(v)) continue;
      const uint distance = row.distance(v);
      const ulong own = Row::place(distance, v);
      if (own >> (shift + 11) != place >> (shift + 11)) continue;
      threadgroup atomic_uint* bin = (threadgroup atomic_uint*)bins + uint(own >> shift) % BINS;
      atomic_fetch_add_explicit(bin, MASS ? row.mass(distance) : 1, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    constexpr uint each = BINS / THREADS;
    uint weights[each], own = 0, total;
    UNROLL for (uint i = 0; i < each; i++) {
      weights[i] = bins[thread_id * each + i];
      own += weights[i];
    }
    uint before = sum_before(own, sums, lane, group, total);
    if (MASS && shift == 44) limit = uint(metal::ceil(share * float(total)));
    if (shift == 44 && total <= limit) return row.last;
    UNROLL for (uint i = 0; i < each; i++) {
      if (before < limit && limit <= before + weights[i]) {
        sums[GROUPS] = thread_id * each + i;
        sums[GROUPS + 1] = before;
      }
      before += weights[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    place |= ulong(sums[GROUPS]) << shift;
    limit -= sums[GROUPS + 1];
    const uint found = bins[sums[GROUPS]];
    const uint one = MASS ? row.mass(uint(place >> 23)) : 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (shift == 22 && limit + one > found) return place | ((1ul << 22) - 1);  // all of this distance
  }
  return place;
}

template <int V, int TILES, typename Tokens, typename Probs>
METAL_FUNC void sample_filtered(
    const device float* best, const device float* logits, const device uint* allowed, const device int* control,
    const device float* sampling, Tokens token, Probs logprob, device int* next, threadgroup uint* bins, threadgroup uint* sums,
    threadgroup float* floats, uint3 tile, uint thread_id, uint lane, uint group) {
  const uint b = tile.x;
  sampling += b * 8;
  control += b * 8;
  if (thread_id < 8) next[b * 8 + thread_id] = control[thread_id] + (thread_id == 0 || thread_id == 2);
  Row row = {logits + ulong(b) * V, allowed + b * (V / 32), -INFINITY, 0.0f, ~0ul};
  const device float4* tiles = (const device float4*)best + ulong(b) * TILES;
  for (uint i = thread_id; i < TILES; i += THREADS) row.high = max(row.high, tiles[i].z);
  row.high = simd_max(row.high);
  if (lane == 0) floats[group] = row.high;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint g = 0; g < GROUPS; g++) row.high = max(row.high, floats[g]);
  for (uint i = thread_id; i < TILES; i += THREADS) {
    const float4 from = tiles[i];
    row.total += from.z == -INFINITY ? 0.0f : from.w * metal::exp(from.z - row.high);
  }
  row.total = simd_sum(row.total);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) floats[group] = row.total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  row.total = 0;
  for (uint g = 0; g < GROUPS; g++) row.total += floats[g];

  const float temperature = sampling[0];
  if (sampling[1] > 0) row.last = keep_first<V, false>(row, uint(sampling[1]), 0, bins, sums, thread_id, lane, group);
  if (sampling[2] < 1) row.last = keep_first<V, true>(row, 0, sampling[2], bins, sums, thread_id, lane, group);
  const float least = sampling[3] > 0 ? metal::log(sampling[3]) : -INFINITY;
  float score = -INFINITY;
  uint id = V;
  for (uint v = thread_id; v < V; v += THREADS) {
    if (!row.keeps(v) || row.logits[v] - row.high < least) continue;
    const float candidate = score_of(row.logits[v], temperature, control, v);
    id = candidate > score ? v : id;
    score = max(score, candidate);
  }
  const float top = simd_max(score);
  id = simd_min(score == top ? id : uint(V));
  score = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    floats[group] = score;
    sums[group] = id;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id > 0) return;
  for (uint g = 0; g < GROUPS; g++) {
    const bool better = floats[g] > score || (floats[g] == score && sums[g] < id);
    id = better ? sums[g] : id;
    score = better ? floats[g] : score;
  }
  id = min(id, uint(V - 1));  // logits that are no numbers
  token[b] = int(id);
  logprob[b] = row.logits[id] - row.high - metal::log(row.total);
}
