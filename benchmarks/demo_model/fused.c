// The two elementwise chains that dominate a training step on a CPU, one pass over memory each.
// Arrays are bfloat16 (uint16_t) and row-major; arithmetic is float. See fused.py for the equations.

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t narrow(float value) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

void swiglu_forward(const uint16_t* wide, uint16_t* out, long rows, long width) {
  for (long r = 0; r < rows; r++, wide += 2 * width, out += width)
    for (long i = 0; i < width; i++) {
      float gate = fminf(widen(wide[i]), 7.0f);
      float up = fmaxf(fminf(widen(wide[width + i]), 7.0f), -7.0f);
      out[i] = narrow((up + 1.0f) * gate * sigmoid(1.702f * gate));
    }
}

void swiglu_backward(const uint16_t* wide, const uint16_t* grad, uint16_t* grad_wide, long rows,
                     long width) {
  for (long r = 0; r < rows; r++, wide += 2 * width, grad_wide += 2 * width, grad += width)
    for (long i = 0; i < width; i++) {
      float raw_gate = widen(wide[i]), raw_up = widen(wide[width + i]), g = widen(grad[i]);
      float gate = fminf(raw_gate, 7.0f), up = fmaxf(fminf(raw_up, 7.0f), -7.0f);
      float s = sigmoid(1.702f * gate);
      float d_gate = g * (up + 1.0f) * s * (1.0f + 1.702f * gate * (1.0f - s));
      float d_up = g * gate * s;
      grad_wide[i] = narrow(raw_gate <= 7.0f ? d_gate : 0.0f);
      grad_wide[width + i] = narrow(fabsf(raw_up) <= 7.0f ? d_up : 0.0f);
    }
}

// scores (n, heads, queries, keys), mask (n, queries, keys) additive float, sinks (heads)
void softmax_forward(const uint16_t* scores, const float* mask, const float* sinks, uint16_t* out,
                     long n, long heads, long queries, long keys, float scale) {
  float row[4096];
  for (long b = 0; b < n; b++)
    for (long h = 0; h < heads; h++)
      for (long q = 0; q < queries; q++, scores += keys, out += keys) {
        const float* seen = mask + (b * queries + q) * keys;
        float largest = sinks[h], total = 0.0f;
        for (long k = 0; k < keys; k++) {
          row[k] = widen(scores[k]) * scale + seen[k];
          largest = fmaxf(largest, row[k]);
        }
        for (long k = 0; k < keys; k++) {
          row[k] = expf(row[k] - largest);
          total += row[k];
        }
        float inverse = 1.0f / (total + expf(sinks[h] - largest));
        for (long k = 0; k < keys; k++) out[k] = narrow(row[k] * inverse);
      }
}

void softmax_backward(const uint16_t* weights, const uint16_t* grad, uint16_t* grad_scores,
                      float* grad_sinks, long n, long heads, long queries, long keys, float scale) {
  for (long b = 0; b < n; b++)
    for (long h = 0; h < heads; h++)
      for (long q = 0; q < queries; q++, weights += keys, grad += keys, grad_scores += keys) {
        float dot = 0.0f, total = 0.0f;
        for (long k = 0; k < keys; k++) {
          dot += widen(weights[k]) * widen(grad[k]);
          total += widen(weights[k]);
        }
        for (long k = 0; k < keys; k++)
          grad_scores[k] = narrow(widen(weights[k]) * (widen(grad[k]) - dot) * scale);
        grad_sinks[h] -= (1.0f - total) * dot;
      }
}
