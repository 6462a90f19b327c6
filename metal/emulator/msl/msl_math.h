// <metal_math>, <metal_common>, <metal_geometric>, <metal_relational> for float, half, bfloat and their
// vectors. `fast` and `precise` are the same functions here: the emulator says nothing about ulps.
#pragma once
namespace metal {
// Defines name(float), the 16-bit forms computed in float, and the elementwise vector form.
#define EMU_UNARY(name, expression)                                                               \
  EMU_INLINE float name(float x) { return expression; }                                           \
  EMU_INLINE half name(half h) { return half(name(float(h))); }                                   \
  EMU_INLINE bfloat name(bfloat h) { return bfloat(name(float(h))); }                             \
  template <class T, int N> EMU_INLINE vec<T, N> name(vec<T, N> v) {                              \
    vec<T, N> r;                                                                                  \
    for (int i = 0; i < N; i++) r[i] = name(T(v[i]));                                             \
    return r;                                                                                     \
  }
#define EMU_ELEMENTWISE_2(name)                                                                   \
  template <class T, int N> EMU_INLINE vec<T, N> name(vec<T, N> a, emu_same<vec<T, N>> b) {       \
    vec<T, N> r;                                                                                  \
    for (int i = 0; i < N; i++) r[i] = name(T(a[i]), T(b[i]));                                    \
    return r;                                                                                     \
  }
#define EMU_ELEMENTWISE_3(name)                                                                   \
  template <class T, int N>                                                                       \
  EMU_INLINE vec<T, N> name(vec<T, N> a, emu_same<vec<T, N>> b, emu_same<vec<T, N>> c) {          \
    vec<T, N> r;                                                                                  \
    for (int i = 0; i < N; i++) r[i] = name(T(a[i]), T(b[i]), T(c[i]));                           \
    return r;                                                                                     \
  }
#define EMU_BINARY(name, expression)                                                              \
  EMU_INLINE float name(float x, float y) { return expression; }                                  \
  EMU_INLINE half name(half x, half y) { return half(name(float(x), float(y))); }                 \
  EMU_INLINE bfloat name(bfloat x, bfloat y) { return bfloat(name(float(x), float(y))); }         \
  EMU_ELEMENTWISE_2(name)

#define EMU_FLOAT_FUNCTIONS                                                                       \
  EMU_UNARY(exp, __builtin_expf(x)) EMU_UNARY(exp2, __builtin_exp2f(x))                           \
  EMU_UNARY(exp10, __builtin_expf(x * 2.302585092994046f)) EMU_UNARY(log, __builtin_logf(x))      \
  EMU_UNARY(log2, __builtin_log2f(x)) EMU_UNARY(log10, __builtin_log10f(x))                       \
  EMU_UNARY(sin, __builtin_sinf(x)) EMU_UNARY(cos, __builtin_cosf(x))                             \
  EMU_UNARY(tan, __builtin_tanf(x)) EMU_UNARY(asin, __builtin_asinf(x))                           \
  EMU_UNARY(acos, __builtin_acosf(x)) EMU_UNARY(atan, __builtin_atanf(x))                         \
  EMU_UNARY(sinh, __builtin_sinhf(x)) EMU_UNARY(cosh, __builtin_coshf(x))                         \
  EMU_UNARY(tanh, __builtin_tanhf(x)) EMU_UNARY(asinh, __builtin_asinhf(x))                       \
  EMU_UNARY(acosh, __builtin_acoshf(x)) EMU_UNARY(atanh, __builtin_atanhf(x))                     \
  EMU_UNARY(sqrt, __builtin_sqrtf(x)) EMU_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                 \
  EMU_UNARY(floor, __builtin_floorf(x)) EMU_UNARY(ceil, __builtin_ceilf(x))                       \
  EMU_UNARY(round, __builtin_roundf(x)) EMU_UNARY(rint, __builtin_rintf(x))                       \
  EMU_UNARY(trunc, __builtin_truncf(x)) EMU_UNARY(fabs, __builtin_fabsf(x))                       \
  EMU_UNARY(fract, x - __builtin_floorf(x))                                                       \
  EMU_UNARY(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f)                                    \
  EMU_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)                                      \
  EMU_BINARY(pow, __builtin_powf(x, y)) EMU_BINARY(powr, __builtin_powf(x, y))                    \
  EMU_BINARY(atan2, __builtin_atan2f(x, y)) EMU_BINARY(fmod, __builtin_fmodf(x, y))               \
  EMU_BINARY(fmax, __builtin_fmaxf(x, y)) EMU_BINARY(fmin, __builtin_fminf(x, y))                 \
  EMU_BINARY(divide, x / y) EMU_BINARY(copysign, __builtin_copysignf(x, y))                       \
  EMU_BINARY(step, y < x ? 0.0f : 1.0f)                                                           \
  EMU_INLINE float sincos(float x, thread float& c) {                                             \
    c = __builtin_cosf(x);                                                                        \
    return __builtin_sinf(x);                                                                     \
  }
EMU_FLOAT_FUNCTIONS
namespace fast { EMU_FLOAT_FUNCTIONS }
namespace precise { EMU_FLOAT_FUNCTIONS }

EMU_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMU_INLINE half fma(half a, half b, half c) { return half(__builtin_fmaf(a, b, c)); }
EMU_INLINE bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(a, b, c)); }
EMU_ELEMENTWISE_3(fma)

#define EMU_MIN_MAX(T, greater, less)                                                             \
  EMU_INLINE constexpr T max(T a, T b) { return greater; }                                        \
  EMU_INLINE constexpr T min(T a, T b) { return less; }                                           \
  EMU_INLINE constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }             \
  EMU_INLINE T max3(T a, T b, T c) { return max(max(a, b), c); }                                  \
  EMU_INLINE T min3(T a, T b, T c) { return min(min(a, b), c); }
#define EMU_INTEGER_MIN_MAX(T) EMU_MIN_MAX(T, a < b ? b : a, b < a ? b : a)
EMU_INTEGER_MIN_MAX(char) EMU_INTEGER_MIN_MAX(uchar) EMU_INTEGER_MIN_MAX(short)
EMU_INTEGER_MIN_MAX(ushort) EMU_INTEGER_MIN_MAX(int) EMU_INTEGER_MIN_MAX(uint)
EMU_INTEGER_MIN_MAX(long) EMU_INTEGER_MIN_MAX(ulong)
// NaN loses against a number, as in fmax and fmin.
#define EMU_FLOAT_MIN_MAX(T) EMU_MIN_MAX(T, a != a || a < b ? b : a, a != a || b < a ? b : a)
#ifdef MSL_PTX  // one instruction, as on Apple's GPUs
EMU_MIN_MAX(float, __builtin_fmaxf(a, b), __builtin_fminf(a, b))
#else
EMU_FLOAT_MIN_MAX(float)
#endif
EMU_FLOAT_MIN_MAX(half) EMU_FLOAT_MIN_MAX(bfloat)
EMU_ELEMENTWISE_2(max) EMU_ELEMENTWISE_2(min) EMU_ELEMENTWISE_3(clamp)
EMU_INLINE float abs(float x) { return __builtin_fabsf(x); }
EMU_INLINE half abs(half x) { return half(__builtin_fabsf(x)); }
EMU_INLINE bfloat abs(bfloat x) { return bfloat(__builtin_fabsf(x)); }

EMU_INLINE float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
EMU_INLINE float frexp(float x, thread int& e) { return __builtin_frexpf(x, &e); }
EMU_INLINE float nextafter(float a, float b) { return __builtin_nextafterf(a, b); }
EMU_INLINE bool isnan(float x) { return __builtin_isnan(x); }
EMU_INLINE bool isinf(float x) { return __builtin_isinf(x); }
EMU_INLINE bool isfinite(float x) { return __builtin_isfinite(x); }
EMU_INLINE bool isnormal(float x) { return __builtin_isnormal(x); }
EMU_INLINE bool signbit(float x) { return __builtin_signbit(x); }

template <class T> EMU_INLINE T mix(T a, emu_same<T> b, emu_same<T> t) { return a + (b - a) * t; }
template <class T> EMU_INLINE T smoothstep(T low, emu_same<T> high, emu_same<T> x) {
  T t = clamp((x - low) / (high - low), T(0), T(1));
  return t * t * (3 - 2 * t);
}
template <class T, int N> EMU_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a[0]) * T(b[0]);
  for (int i = 1; i < N; i++) sum += T(a[i]) * T(b[i]);
  return sum;
}
template <class T> EMU_INLINE vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}
template <class T, int N> EMU_INLINE T length_squared(vec<T, N> a) { return dot(a, a); }
template <class T, int N> EMU_INLINE T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> EMU_INLINE T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }
template <class T, int N> EMU_INLINE vec<T, N> normalize(vec<T, N> a) { return a * rsqrt(dot(a, a)); }

template <class T, class = enable_if_t<is_arithmetic_v<T>>>
EMU_INLINE T select(T a, emu_same<T> b, bool c) {
  return c ? b : a;
}
template <class T, int N, class B>
EMU_INLINE vec<T, N> select(vec<T, N> a, emu_same<vec<T, N>> b, vec<B, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
EMU_INLINE bool any(bool c) { return c; }
EMU_INLINE bool all(bool c) { return c; }
template <class B, int N> EMU_INLINE bool any(vec<B, N> c) {
  for (int i = 0; i < N; i++)
    if (c[i]) return true;
  return false;
}
template <class B, int N> EMU_INLINE bool all(vec<B, N> c) {
  for (int i = 0; i < N; i++)
    if (!c[i]) return false;
  return true;
}
}  // namespace metal
