// The clamped SwiGLU of gpt-oss: the gate is clamped from above only, the linear half on both sides.
#pragma once

METAL_FUNC float swiglu(float gate, float up, float alpha, float limit) {
  gate = min(gate, limit);
  up = clamp(up, -limit, limit);
  return gate / (1.0f + metal::exp(-alpha * gate)) * (up + 1.0f);
}
