// Float functions on NVPTX without a math library: the hardware's approximations, and what follows
// from them. Good to about 1e-6 relative in the ranges kernels use; functions missing here do not link.
#pragma once
#define EMU_PTX_MATH inline __attribute__((always_inline)) float
EMU_PTX_MATH emu_exp2(float x) { return __nvvm_ex2_approx_f(x); }
EMU_PTX_MATH emu_log2(float x) { return __nvvm_lg2_approx_f(x); }
EMU_PTX_MATH emu_exp(float x) { return emu_exp2(x * 1.44269504f); }
EMU_PTX_MATH emu_log(float x) { return emu_log2(x) * 0.693147181f; }
EMU_PTX_MATH emu_log10(float x) { return emu_log2(x) * 0.301029996f; }
EMU_PTX_MATH emu_pow(float x, float y) { return emu_exp2(y * emu_log2(x)); }
EMU_PTX_MATH emu_tanh(float x) { return 1.0f - 2.0f / (emu_exp(2.0f * x) + 1.0f); }
EMU_PTX_MATH emu_fmod(float x, float y) { return x - y * __builtin_truncf(x / y); }
EMU_PTX_MATH emu_ldexp(float x, int k) { return x * emu_exp2(float(k)); }
EMU_PTX_MATH emu_sin(float x) { return __nvvm_sin_approx_f(x); }
EMU_PTX_MATH emu_cos(float x) { return __nvvm_cos_approx_f(x); }
EMU_PTX_MATH emu_sqrt(float x) { return __nvvm_sqrt_rn_f(x); }
#define __builtin_exp2f emu_exp2
#define __builtin_log2f emu_log2
#define __builtin_expf emu_exp
#define __builtin_logf emu_log
#define __builtin_log10f emu_log10
#define __builtin_powf emu_pow
#define __builtin_tanhf emu_tanh
#define __builtin_fmodf emu_fmod
#define __builtin_ldexpf emu_ldexp
#define __builtin_sinf emu_sin
#define __builtin_cosf emu_cos
#define __builtin_sqrtf emu_sqrt
