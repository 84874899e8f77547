// Vectors for the CPU kernels: GCC/Clang vector extensions, one lane count per ISA; their storage
// formats. simd_lanes.h and simd_exp2.h build on it.
//
// Every kernel file is compiled once per ISA with XATTN_ISA set to its name, so everything here
// lives in a namespace of that name: two builds of one inline function never meet in the linker.
// For the same reason nothing here includes a C++ library or torch header.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef XATTN_ISA
#error "compile with -DXATTN_ISA=<name>; setup.py does"
#endif

#define XATTN_INLINE static inline __attribute__((always_inline))
#define XATTN_LAMBDA_INLINE __attribute__((always_inline))
#define XATTN_MEMBER inline __attribute__((always_inline))
#define XATTN_UNROLL _Pragma("GCC unroll 16")
#define XATTN_ROLLED _Pragma("GCC unroll 1")

namespace xattn::XATTN_ISA {

// Lanes of a float vector, and the tile of accumulators that fills the register file.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr double kLog2e = 1.44269504088896341;
constexpr double kLn2 = 0.693147180559945309;

// Storage types. Arithmetic on them is in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Lanes {
  static constexpr int n = kVectorBytes / sizeof(T);
};

template <class T, int L = Lanes<T>::n>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
};
template <class T, int L = Lanes<T>::n>
using vec = typename VecOf<T, L>::type;

using vfloat = vec<float>;
using vdouble = vec<double>;
using vu32 = vec<uint32_t>;

// The type a storage type is computed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

template <class T>
XATTN_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
XATTN_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
XATTN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------- load, store, splat, prefetch

template <class T>
XATTN_INLINE vec<T> splat(T x) {
  return x - vec<T>{};  // x - 0 is x even for -0, so this is a broadcast and no addition
}

template <class V, class P>
XATTN_INLINE V load_as(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class P>
XATTN_INLINE void store_as(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

XATTN_INLINE vfloat load(const float* p) { return load_as<vfloat>(p); }
XATTN_INLINE vdouble load(const double* p) { return load_as<vdouble>(p); }
XATTN_INLINE vu32 load(const uint32_t* p) { return load_as<vu32>(p); }
XATTN_INLINE void store(float* p, vfloat v) { store_as(p, v); }
XATTN_INLINE void store(double* p, vdouble v) { store_as(p, v); }
XATTN_INLINE void store(uint32_t* p, vu32 v) { store_as(p, v); }

using half_lanes = vec<uint16_t, Lanes<float>::n>;  // as many 16-bit values as floats in a vector

XATTN_INLINE vfloat load(const bf16* p) {
#if defined(__AVX512F__)
  return (vfloat)((vu32)_mm512_cvtepu16_epi32((__m256i)load_as<half_lanes>(p)) << 16);
#elif defined(__AVX2__)
  return (vfloat)((vu32)_mm256_cvtepu16_epi32((__m128i)load_as<half_lanes>(p)) << 16);
#else
  return (vfloat)(__builtin_convertvector(load_as<half_lanes>(p), vu32) << 16);
#endif
}

// Rounds to nearest even; a NaN stays a NaN.
XATTN_INLINE half_lanes to_bf16(vfloat v) {
#if defined(__AVX512BF16__)
  return (half_lanes)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu32 u = (vu32)v;
  const vu32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu32 nan = (vu32)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), half_lanes);
#endif
}
XATTN_INLINE void store(bf16* p, vfloat v) { store_as(p, to_bf16(v)); }

XATTN_INLINE vfloat load(const f16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps((__m256i)load_as<half_lanes>(p));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps((__m128i)load_as<half_lanes>(p));
#else
  // Shift the exponent into place and rescale by 2^112: exact for subnormals too.
  const vu32 h = __builtin_convertvector(load_as<half_lanes>(p), vu32);
  const vfloat scaled = (vfloat)((h & 0x7fff) << 13) * 0x1p112f;
  const vu32 special = (vu32)((h & 0x7c00) == 0x7c00);  // infinity and NaN
  return (vfloat)((vu32)scaled | (special & 0x7f800000) | ((h & 0x8000) << 16));
#endif
}

XATTN_INLINE half_lanes to_f16(vfloat v) {
#if defined(__AVX512F__)
  return (half_lanes)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (half_lanes)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu32 u = (vu32)v, magnitude = u & 0x7fffffff;
  // Normal results: rebias the exponent and round to nearest even on bit 13.
  const vu32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 puts the 10 bits at the bottom of the mantissa, rounded.
  const vu32 small = (vu32)((vfloat)magnitude + 0.5f) - 0x3f000000;
  const vu32 is_small = (vu32)(magnitude < 0x38800000);
  const vu32 is_large = (vu32)(magnitude >= 0x477ff000);  // rounds to infinity, is it, or is NaN
  const vu32 is_nan = (vu32)(magnitude > 0x7f800000);
  const vu32 large = (is_nan & 0x200) | 0x7c00;
  const vu32 h = (is_large & large) | (~is_large & ((is_small & small) | (~is_small & normal)));
  return __builtin_convertvector(h | ((u >> 16) & 0x8000), half_lanes);
#endif
}
XATTN_INLINE void store(f16* p, vfloat v) { store_as(p, to_f16(v)); }

// The first n lanes; the rest read as zero and are not written. n in [0, lanes].
template <class S>
XATTN_INLINE auto load_n(const S* p, int64_t n) {
  constexpr int lanes = Lanes<typename ComputeOf<S>::type>::n;
  if (n >= lanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  } else if constexpr (sizeof(S) == 2) {
    const auto bits = (half_lanes)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    S whole[lanes];
    store_as(whole, bits);
    return load(whole);
  }
#endif
  S padded[lanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(S));
  return load(padded);
}
template <class S, class V>
XATTN_INLINE void store_n(S* p, V v, int64_t n) {
  constexpr int lanes = Lanes<typename ComputeOf<S>::type>::n;
  if (n >= lanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  } else if constexpr (sizeof(S) == 2) {
    S whole[lanes];
    store(whole, v);
    return _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1),
                                    (__m256i)load_as<half_lanes>(whole));
  }
#endif
  S padded[lanes];
  store(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(S));
}

// One value of any storage type, through the vector conversions.
XATTN_INLINE float load_1(const float* p) { return *p; }
XATTN_INLINE double load_1(const double* p) { return *p; }
XATTN_INLINE float load_1(const bf16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
XATTN_INLINE float load_1(const f16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#else
  return load_n(p, 1)[0];
#endif
}
XATTN_INLINE void store_1(float* p, float x) { *p = x; }
XATTN_INLINE void store_1(double* p, double x) { *p = x; }
XATTN_INLINE void store_1(bf16* p, float x) { store_n(p, splat(x), 1); }
XATTN_INLINE void store_1(f16* p, float x) { store_n(p, splat(x), 1); }

XATTN_INLINE void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 3); }
XATTN_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }
XATTN_INLINE void prefetch_line_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace xattn::XATTN_ISA
