// expert_groups: each row's experts and their weights, and the (row, choice) pairs in blocks of one expert.
//   e[b,k] = k-th largest of logits[b,:];  share[b,:] = softmax of those logits;  pair p = b * CHOSEN + k
//   a block: 1 to 4 pairs of one expert, in the order of pairs; blocks by expert, then by pair
// Inputs:    logits (B,E) f32
// Output:    blocks (M,8) i32: expert, count, 4 pairs, 0, 0; pairs past the count repeat the first, blocks past the last
//            are 0; choice (B,CHOSEN,2) f32: expert and share
// Grid:      one threadgroup of a simdgroup a row, 32 at most: it chooses for its rows, then a thread finds the place of
//            a pair by counting. 128 pairs are too few to sort by more than one core. The rows are no constant: a turn
//            that comes or goes must not compile a kernel.
// Numerics:  the shares of choose.h, bit for bit.
// Requires:  a thread for each pair; E < 2^24; M large enough for any choice; checked in kernels.expert_groups.
// Used when: a batch is so large that its rows share experts, see kernels/batches.py.
// Not fused: with the router, whose logits it needs all; expert_dispatch would want the choice from another dispatch.
// Source:    our own.
#include "choose.h"

template <int E, int CHOSEN>
METAL_FUNC void expert_groups(
    const device float* logits, device int* blocks, device float* choice, threadgroup uint* experts,
    threadgroup uint* ranks, uint rows, uint thread_id, uint lane, uint group) {
  for (uint b = group; b < rows; b += min(rows, 32u)) {
    uint own[CHOSEN];
    float shares[CHOSEN];
    choose<E, CHOSEN>(logits + b * E, lane, own, shares);
    UNROLL for (int k = 0; k < CHOSEN; k++) {
      const uint pair = b * CHOSEN + k;
      if (lane == 0) {
        experts[pair] = own[k];
        choice[2 * pair] = float(own[k]);
        choice[2 * pair + 1] = shares[k];
      }
    }
  }
  const uint pairs = rows * CHOSEN, begun = min(pairs, uint(E)), most = begun + (pairs - begun) / 4;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint expert = experts[min(thread_id, pairs - 1)];
  uint rank = 0, count = 0;  // pairs of this expert before this one, and in all
  for (uint p = 0; p < pairs; p++) {
    rank += experts[p] == expert && p < thread_id;
    count += experts[p] == expert;
  }
  if (thread_id < pairs) ranks[thread_id] = rank;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_id >= pairs) return;
  uint block = rank / 4, used = 0;
  for (uint p = 0; p < pairs; p++) {
    block += ranks[p] % 4 == 0 && experts[p] < expert;
    used += ranks[p] % 4 == 0;
  }
  device int* out = blocks + block * 8;
  out[2 + rank % 4] = int(thread_id);
  if (rank % 4 == 0) {
    out[0] = int(expert);
    out[1] = int(min(count - rank, 4u));
    for (uint i = count - rank; i < 4; i++) out[2 + i] = int(thread_id);
    out[6] = 0;
    out[7] = 0;
  }
  if (thread_id >= used && thread_id < most) {
    UNROLL for (int i = 0; i < 8; i++) blocks[thread_id * 8 + i] = 0;
  }
}
