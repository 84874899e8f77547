// Powers of two of vectors, for softmax; see simd.h.
#pragma once

#include "simd_lanes.h"

namespace xattn::XATTN_ISA {

// 2^x to 1e-7 relative (float) for x <= 0; 0 below the smallest normal's neighbourhood; NaN stays.
XATTN_INLINE vfloat exp2_nonpositive(vfloat x) {
#if defined(__AVX512F__)
  x = vmax(splat(-150.0f), x);
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vfloat r = x - (vfloat)n;
#else
  x = vmax(splat(-127.0f), x);           // whose result has exponent and mantissa 0
  const vfloat shifted = x + 0x1.8p23f;  // the integer part, in the low bits of the mantissa
  const vfloat r = x - (shifted - 0x1.8p23f);
#endif
  vfloat p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, n);
#else
  return (vfloat)((vu32)p + ((vu32)shifted << 23));
#endif
}

// 2^x to 1e-4 relative: enough where the result is rounded to bfloat16 at once.
XATTN_INLINE vfloat exp2_nonpositive_rough(vfloat x) {
#if defined(__AVX512F__)
  x = vmax(splat(-150.0f), x);
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vfloat r = x - (vfloat)n;
  vfloat p = splat(0.05550410866f);
  p = p * r + 0.2402264923f;
  p = p * r + 0.6931471806f;
  p = p * r + 1.0f;
  return (vfloat)_mm512_scalef_ps((__m512)p, n);
#else
  return exp2_nonpositive(x);
#endif
}

// 2^x as accurate as results stored as S need it.
template <class S>
XATTN_INLINE vfloat exp2_for(vfloat x) {
  return __is_same(S, bf16) ? exp2_nonpositive_rough(x) : exp2_nonpositive(x);
}

// 2^x to 1e-15 relative: the Taylor series of e^(x ln 2), |x ln 2| <= 0.347 after reduction.
XATTN_INLINE vdouble exp2_nonpositive(vdouble x) {
  x = vmax(splat(-1100.0), x);
  const vdouble shifted = x + 0x1.8p52;
  const vdouble r = (x - (shifted - 0x1.8p52)) * kLn2;
  vdouble p = splat(1.0 / 87178291200.0);
  double factorial = 87178291200.0;  // 14!
  XATTN_UNROLL
  for (int i = 14; i > 0; --i) {
    factorial /= i;
    p = p * r + 1.0 / factorial;
  }
  using vi64 = vec<int64_t>;
  const vdouble scaled = (vdouble)((vi64)p + ((vi64)shifted << 52));
  return x < -1020.0 ? vdouble{} : scaled;
}

template <class S>
XATTN_INLINE vdouble exp2_for(vdouble x) {
  return exp2_nonpositive(x);
}

}  // namespace xattn::XATTN_ISA
