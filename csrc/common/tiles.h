// Register tiles: the small matrix products that every CPU kernel is made of.
//
// A policy says what one step of the inner dimension multiplies: one float, one double, or (where
// the CPU has it) a pair of bfloat16 values in 32 bits. The tiles below are written once for all.
#pragma once

#include "loops.h"

namespace xattn::XATTN_ISA {

template <class T>
struct Single {
  using Acc = T;                   // accumulator lane
  using Elem = T;                  // what one step of the inner dimension reads
  using Storage = T;               // of one value in a packed operand
  static constexpr int kStep = 1;  // values of the inner dimension in an Elem
  XATTN_INLINE vec<T> fma(vec<T> acc, vec<T> a, vec<T> b) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
// Two neighbours of the inner dimension in one 32-bit element, products summed in float.
struct Bf16Pairs {
  using Acc = float;
  using Elem = uint32_t;
  using Storage = bf16;
  static constexpr int kStep = 2;
  XATTN_INLINE vfloat fma(vfloat acc, vu32 a, vu32 b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// How tiles multiply a storage type: bfloat16 in pairs where the CPU can.
template <class S>
struct PolicyOf {
  using type = Single<typename ComputeOf<S>::type>;
};
#if defined(__AVX512BF16__)
template <>
struct PolicyOf<bf16> {
  using type = Bf16Pairs;
};
#endif

// f(Type<storage type>, Type<policy>) of a dtype.
template <class F>
void with_policy(Dtype dtype, F f) {
  with_storage(dtype, [&](auto storage) {
    f(storage, Type<typename PolicyOf<typename decltype(storage)::type>::type>{});
  });
}

template <class M>
using acc_vec = vec<typename M::Acc>;
template <class M>
constexpr int kLanesOf = Lanes<typename M::Acc>::n;

// 2^x for weights that a product takes next: rough where it rounds them to bfloat16.
template <class M>
XATTN_INLINE acc_vec<M> exp2_weight(acc_vec<M> x) {
  if constexpr (M::kStep == 2) {
    return exp2_nonpositive_rough(x);
  } else {
    return exp2_nonpositive(x);
  }
}

// acc[r][c] += sum_k a(r, k) * b(k, c): a(r, k) = a[r * a_row + k * a_k] is one element for all
// lanes, b(k, c) a vector of elements at b + k * b_k + c * b_col.
template <class M, int R, int C>
XATTN_INLINE void tile_broadcast(acc_vec<M> (&acc)[R][C], const typename M::Elem* a, int64_t a_row,
                                 int64_t a_k, const typename M::Elem* b, int64_t b_k, int64_t b_col,
                                 int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    decltype(load(b)) bv[C];
    XATTN_UNROLL
    for (int c = 0; c < C; ++c) bv[c] = load(b + k * b_k + c * b_col);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto av = splat(a[r * a_row + k * a_k]);
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = M::fma(acc[r][c], av, bv[c]);
    }
  }
}

// acc[r][c] += sum_k a(r, k) * b(c, k), lane by lane: both operands are vectors of elements, at
// a + r * a_row + k * a_k and b + c * b_col + k * b_k.
template <class M, int R, int C>
XATTN_INLINE void tile_lanes(acc_vec<M> (&acc)[R][C], const typename M::Elem* a, int64_t a_row,
                             int64_t a_k, const typename M::Elem* b, int64_t b_col, int64_t b_k,
                             int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    decltype(load(a)) av[R];
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) av[r] = load(a + r * a_row + k * a_k);
    XATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const auto bv = load(b + c * b_col + k * b_k);
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) acc[r][c] = M::fma(acc[r][c], av[r], bv);
    }
  }
}

// Two float vectors as interleaved bfloat16 pairs, and two stored rows of as many values.
#if defined(__AVX512BF16__)
XATTN_INLINE vu32 interleave(__m512i low_then_high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu32)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), low_then_high);
}
XATTN_INLINE vu32 to_pair(vfloat low, vfloat high) {
  return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
XATTN_INLINE vu32 to_pair(const bf16* low, const bf16* high) {
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)load_as<half_lanes>(low)),
                                       (__m256i)load_as<half_lanes>(high), 1));
}
#endif

}  // namespace xattn::XATTN_ISA
