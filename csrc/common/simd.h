// Vectors for the CPU kernels: GCC/Clang vector extensions, one lane count per ISA.
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

// ---------------------------------------------------------------- load, store, splat

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

// ---------------------------------------------------------------- lane arithmetic

// The larger of each lane; the second argument where either is NaN.
XATTN_INLINE vfloat vmax(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
XATTN_INLINE vdouble vmax(vdouble a, vdouble b) { return a > b ? a : b; }

// Lane permutations over two vectors, given as index lists of a constexpr function.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <int kParity, class V, int... I>
XATTN_INLINE V every_other(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + kParity)...);
}

struct Add {
  template <class V>
  XATTN_MEMBER V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <class V>
  XATTN_MEMBER V operator()(V a, V b) const {
    return vmax(a, b);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Lane i of the left or right side of a fold where crossing the halves of a vector is dear: lanes
// fold with their neighbours within a half, and the halves last, when kLeft lanes a row are two.
template <int kSide, int kLeft>
constexpr int side_lane(int i, int lanes) {
  const int half = lanes / 2, block = i / half * half, j = i % half;
  if (kLeft == 2) return i < half ? kSide * half + i : lanes + kSide * half + j;
  return j < half / 2 ? block + 2 * j + kSide : lanes + block + 2 * (j - half / 2) + kSide;
}
template <int kSide, int kLeft, class V, int... I>
XATTN_INLINE V fold_side(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, side_lane<kSide, kLeft>(I, sizeof...(I))...);
}
#else
template <int kSide, int kLeft, class V, class I>
XATTN_INLINE V fold_side(V a, V b, I indices) {
  return every_other<kSide>(a, b, indices);
}
#endif

// [a0+a1, a2+a3, ..., b0+b1, ...] for op = Add, in some order of lanes; a row has kLeft lanes left.
template <class Op, int kLeft, class V>
XATTN_INLINE V fold_neighbours(V a, V b) {
  using I = typename MakeIndices<sizeof(V) / sizeof(a[0])>::type;
  return Op{}(fold_side<0, kLeft>(a, b, I{}), fold_side<1, kLeft>(a, b, I{}));
}
template <class Op, int kLeft, class V>
XATTN_INLINE V fold_alone(V v) {
  if constexpr (kLeft == 1) {
    return v;
  } else {
    return fold_alone<Op, kLeft / 2>(fold_neighbours<Op, kLeft>(v, v));
  }
}
template <class Op, int kCount, class V, int kRows>
XATTN_INLINE V fold_rounds(V (&rows)[kRows]) {
  constexpr int kLeft = sizeof(V) / sizeof(rows[0][0]) * kCount / kRows;
  if constexpr (kCount == 1) {
    return fold_alone<Op, kLeft>(rows[0]);
  } else {
    XATTN_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      rows[i] = fold_neighbours<Op, kLeft>(rows[2 * i], rows[2 * i + 1]);
    }
    return fold_rounds<Op, kCount / 2>(rows);
  }
}

// out[r] = the lanes of rows[r] folded with op, in a fixed order; writes whole vectors. Cheaper
// than folding every row alone: the rows share the shuffles.
template <class Op, class V, class T, int kRows>
XATTN_INLINE void fold_each(V (&rows)[kRows], T* out) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  constexpr int power = kRows > 8 ? 16 : kRows > 4 ? 8 : kRows > 2 ? 4 : kRows;
  constexpr int group = power < lanes ? power : lanes;
  XATTN_UNROLL
  for (int first = 0; first < kRows; first += group) {
    V part[group];
    XATTN_UNROLL
    for (int i = 0; i < group; ++i) part[i] = rows[first + i < kRows ? first + i : kRows - 1];
    store(out + first, fold_rounds<Op, group>(part));
  }
}

template <int kDistance, class V, int... I>
XATTN_INLINE V rotate(V a, Indices<I...>) {
  return __builtin_shufflevector(a, a, ((I ^ kDistance))...);
}
template <int kDistance, class V>
XATTN_INLINE V swap_lanes(V a) {
  return rotate<kDistance>(a, typename MakeIndices<sizeof(V) / sizeof(a[0])>::type{});
}

template <int kDistance, class V>
XATTN_INLINE V sum_tree(V v) {
  if constexpr (kDistance == 0) {
    return v;
  } else {
    return sum_tree<kDistance / 2>(v + swap_lanes<kDistance>(v));
  }
}
template <int kDistance, class V>
XATTN_INLINE V max_tree(V v) {
  if constexpr (kDistance == 0) {
    return v;
  } else {
    return max_tree<kDistance / 2>(vmax(v, swap_lanes<kDistance>(v)));
  }
}
// Sum and maximum over the lanes, in a fixed order.
template <class V>
XATTN_INLINE auto sum_lanes(V v) {
  return sum_tree<sizeof(V) / sizeof(v[0]) / 2>(v)[0];
}
template <class V>
XATTN_INLINE auto max_lanes(V v) {
  return max_tree<sizeof(V) / sizeof(v[0]) / 2>(v)[0];
}

// Transposes a square of lanes x lanes in registers: log2(lanes) rounds of two-way merges.
template <int kDistance, bool kHigh, class V, int... I>
XATTN_INLINE V merge(V a, V b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(
      a, b, ((I & kDistance) ? n + (kHigh ? I : I - kDistance) : (kHigh ? I + kDistance : I))...);
}
template <int kDistance, class V, int kRows>
XATTN_INLINE void transpose_rounds(V (&r)[kRows]) {
  if constexpr (kDistance > 0) {
    using I = typename MakeIndices<kRows>::type;
    XATTN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i & kDistance) continue;
      const V a = r[i], b = r[i + kDistance];
      r[i] = merge<kDistance, false>(a, b, I{});
      r[i + kDistance] = merge<kDistance, true>(a, b, I{});
    }
    transpose_rounds<kDistance / 2>(r);
  }
}
template <class V, int kRows>
XATTN_INLINE void transpose(V (&r)[kRows]) {
  static_assert(kRows == sizeof(V) / sizeof(r[0][0]), "a square of lanes");
  transpose_rounds<kRows / 2>(r);
}

// ---------------------------------------------------------------- 2^x

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

XATTN_INLINE void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 3); }
XATTN_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }
XATTN_INLINE void prefetch_line_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace xattn::XATTN_ISA
