// Between the lanes of vectors: maxima, folds of rows, transposes; see simd.h.
#pragma once

#include "simd.h"

namespace xattn::XATTN_ISA {

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

}  // namespace xattn::XATTN_ISA
