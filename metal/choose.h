// The CHOSEN largest of E router logits, by every simdgroup that needs them: cheaper than one more dispatch.
#pragma once
#include "simd.h"

// Largest first, ties to the lower index; all lanes get the same answer. Weights are the softmax over the chosen.
template <int E, int CHOSEN, typename Logits>
METAL_FUNC void choose(Logits logits, uint lane, thread uint* experts, thread float* weights) {
  constexpr int each = (E + 31) / 32;
  float values[each];
  UNROLL for (int i = 0; i < each; i++) values[i] = lane + 32 * i < E ? logits[min(lane + 32 * i, uint(E - 1))] : -INFINITY;
  float first = 0, total = 0;
  UNROLL for (int k = 0; k < CHOSEN; k++) {
    float best = values[0];
    UNROLL for (int i = 1; i < each; i++) best = max(best, values[i]);
    best = simd_max(best);
    uint at = E - 1;  // stays in range even if every logit is NaN
    UNROLL for (int i = 0; i < each; i++) at = values[i] == best ? min(lane + 32 * i, at) : at;
    at = simd_min(at);
    UNROLL for (int i = 0; i < each; i++) values[i] = lane + 32 * i == at ? -INFINITY : values[i];
    first = k == 0 ? best : first;
    experts[k] = at;
    weights[k] = metal::exp(best - first);
    total += weights[k];
  }
  UNROLL for (int k = 0; k < CHOSEN; k++) weights[k] /= total;
}
