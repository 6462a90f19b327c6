// The noise of a draw, a hash of (seed, position, id): sampling.gumbel's, bit for bit up to log.
#pragma once

// "lowbias32" of Chris Wellons (public domain), as in sampling.py.
METAL_FUNC uint mix(uint x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

METAL_FUNC float gumbel(uint low, uint high, uint position, uint id) {
  low = mix(low + 0x9E3779B9u);
  const uint a = mix(low ^ position), b = mix(mix(high ^ low) + a);
  const uint bits = mix(mix(id + a) ^ b);
  const float w = min((float(bits) + 0.5f) * 2.3283064365386963e-10f, 0.99999994f), rest = 1.0f - w;
  // w = bits / 2^32, below 1; -log(1 - w), exact for small w too: the rounding of `rest` cancels in the ratio (Goldberg 1991, theorem 4)
  const float exponential = rest == 1.0f ? w : -metal::log(rest) * (w / (1.0f - rest));
  return -metal::log(exponential);
}

// What the next token is the largest of: logits[v] / temperature + noise, without noise at 0. `control` is a row:
// position, base, slot, seed low, seed high.
METAL_FUNC float score_of(float logit, float temperature, const device int* control, uint v) {
  if (temperature == 0) return logit;
  return logit / max(temperature, 1e-6f) + gumbel(uint(control[3]), uint(control[4]), uint(control[0]) + 1, v);
}
