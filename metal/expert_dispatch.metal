// expert_dispatch: the (token, expert) pairs of a chunk in the order of their experts, by counting.
//   inverse[p] = #{q : e_q < e_p} + #{q < p : e_q = e_p};  sorted[inverse[p]] = e_p;  tokens[inverse[p]] = p / K
//   offsets[e] = #{q : e_q < e}
// Inputs:    experts (N,K) u32, < E, in whatever address space MLX gives so few values
// Output:    tokens, inverse, sorted (P,) u32, P = N*K; offsets (E+1,) u32
// Grid:      E threadgroups of SIMDS simdgroups, one for each expert. Each reads all ids, twice, and keeps its own: no
//            group needs another's count, so one dispatch does, and the order is stable without atomics. It reads the
//            8 KB of 512 tokens' ids 64 times, out of a cache, where two dispatches would read them twice.
// Numerics:  integers.
// Requires:  ids below E; P < 2^31; the shape is checked in kernels.expert_dispatch, the ids are the router's.
// Used when: a chunk has so many pairs that they are worth grouping, see moe.py.
// Not fused: with the router, whose choice all groups wait for; with the gather of rows, which GEMMs read sorted.
// Source:    our own.

template <int CHOSEN, int SIMDS, typename Ids>
METAL_FUNC void expert_dispatch(
    Ids experts, device uint* tokens, device uint* inverse, device uint* sorted, device uint* offsets,
    threadgroup uint* counts, uint pairs, uint groups, uint3 tile, uint lane, uint group) {
  const uint expert = tile.x, part = (pairs + 32 * SIMDS - 1) / (32 * SIMDS) * 32;
  const uint first = min(group * part, pairs), last = min(first + part, pairs);  // this simdgroup's pairs
  uint lower = 0, equal = 0;
  for (uint p = first + lane; p < last; p += 32) {
    const uint id = experts[p];
    lower += id < expert;
    equal += id == expert;
  }
  lower = simd_sum(lower);
  equal = simd_sum(equal);
  if (lane == 0) {
    counts[2 * group] = lower;
    counts[2 * group + 1] = equal;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint at = 0;
  for (uint g = 0; g < SIMDS; g++) at += counts[2 * g] + (g < group ? counts[2 * g + 1] : 0);
  if (group == 0 && lane == 0) {
    offsets[expert] = at;
    if (expert == groups - 1) offsets[groups] = pairs;
  }
  for (uint from = first; from < last; from += 32) {
    const uint p = from + lane;
    const bool own = p < last && experts[min(p, pairs - 1)] == expert;
    const uint owners = uint(simd_vote::vote_t(simd_ballot(own)));
    if (own) {
      const uint place = at + popcount(owners & ((1u << lane) - 1));
      tokens[place] = p / CHOSEN;
      sorted[place] = expert;
      inverse[p] = place;
    }
    at += popcount(owners);
  }
}
