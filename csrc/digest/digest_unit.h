// Sizes of one image and head, the order of its keys, and what forward and backward both compute.
#pragma once

#include "common/arena.h"
#include "common/dropout.h"
#include "common/loops.h"
#include "common/pack.h"
#include "digest.h"

namespace xattn::XATTN_ISA::digest {

// kStats numbers are kept of each softmax row: its largest logit (in powers of two, at least
// kLowest) and the reciprocal of its sum.
constexpr int kStats = 2;
constexpr float kLowest = -3e38f;
constexpr float kNever = -__builtin_inff();  // logit of the lanes that only fill a vector of keys

// S: storage type. M: multiply policy. kHeadDim: known at compile time, or 0.
template <class S, class M, int kHeadDim>
struct Unit {
  using Storage = S;
  using Multiply = M;
  using T = typename M::Acc;
  using Elem = typename M::Elem;
  using Weight = typename M::Storage;  // of a softmax weight that a tile multiplies
  using V = vec<T>;
  using P = Pack<S, M>;
  static constexpr int L = kLanesOf<M>;
  static constexpr int kStep = M::kStep;
  static constexpr bool kPairs = kStep == 2;
  // Accumulators kRows x kColumns fill the register file. 7 divides the 196 and 49 tokens of
  // CabViT; where rows come in pairs, 10 wastes least of them.
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kRows = kPairs ? 10 : 7, kColumns = kPairs ? 2 : 3, kKeyRows = 8;
#else
  static constexpr int kRows = 4, kColumns = 3, kKeyRows = 4;
#endif
  const DigestArgs& args;

  int64_t d() const { return kHeadDim ? kHeadDim : args.head_dim; }
  int64_t steps_d() const { return (d() + kStep - 1) / kStep; }  // inner steps over channels
  int64_t stride_d() const { return round_up(steps_d(), L); }    // row of Elems
  int64_t width_d() const { return round_up(d(), L); }           // row of channels
  // Of keys; enough to give sums over queries whole tiles of kKeyRows keys.
  int64_t vectors() const { return round_up(args.keys(), max_of(L, kKeyRows)) / L; }
  int64_t tiles(int64_t queries) const { return (queries + kRows - 1) / kRows; }
  // Rows of logits or weights, and of dropout factors, which come as vectors of floats whatever T
  // is. An odd number of vectors keeps rows apart in the sets of a cache.
  static int64_t stride(int64_t vectors) { return (vectors | 1) * L; }
  static int64_t factor_stride(int64_t vectors) { return round_up(vectors * L, Lanes<float>::n); }
  int64_t index_size() const { return vectors() * L + Lanes<float>::n; }
  int64_t transposed_size() const { return vectors() * steps_d() * L; }
  int64_t values_size() const { return vectors() * L / kStep * width_d(); }

  T* stats(int64_t b, int64_t head, int64_t i) const {
    return (T*)args.row_stats + ((b * args.heads + head) * args.tokens + i) * kStats;
  }

  static XATTN_MEMBER V exp2(V x) { return exp2_weight<M>(x); }

  // acc = scale q k^T + bias, in powers of two, of one tile: queries against kC vectors of keys.
  template <int kC, class Bias>
  XATTN_MEMBER void logits(V (&acc)[kRows][kC], const Elem* queries, const Elem* keys,
                           const Bias& bias, int64_t row, int64_t vector) const {
    products(acc, queries, keys, vector);
    const T scale = T(args.scale * kLog2e);
    XATTN_UNROLL
    for (int c = 0; c < kC; ++c) {
      bias.with_column(vector + c, row, [&](auto term) XATTN_LAMBDA_INLINE {
        XATTN_UNROLL
        for (int r = 0; r < kRows; ++r) acc[r][c] = acc[r][c] * scale + term(r);
      });
    }
  }
  // acc = rows . columns^T, with `columns` packed by Pack::transposed.
  template <int kC>
  XATTN_MEMBER void products(V (&acc)[kRows][kC], const Elem* rows, const Elem* columns,
                             int64_t vector) const {
    const int64_t column = steps_d() * L;
    XATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < kC; ++c) acc[r][c] = V{};
    }
    tile_broadcast<M>(acc, rows, stride_d(), 1, columns + vector * column, L, column, steps_d());
  }

  // out(row, channel, vector) = sum over `steps` of a(row, step) * values(step, :), kR rows.
  template <int kR, class Out>
  XATTN_MEMBER void weighted_sum(const Elem* a, int64_t a_row, int64_t a_step, const Elem* values,
                                 int64_t steps, Out out) const {
    for_columns<kColumns, 1>(width_d() / L, [&](auto group, int64_t first) XATTN_LAMBDA_INLINE {
      constexpr int C = decltype(group)::value;
      V acc[kR][C] = {};
      tile_broadcast<M>(acc, a, a_row, a_step, values + first * L, width_d(), L, steps);
      XATTN_UNROLL
      for (int r = 0; r < kR; ++r) {
        XATTN_UNROLL
        for (int c = 0; c < C; ++c) out(r, (first + c) * L, acc[r][c]);
      }
    });
  }
};

// Keys in the order of the kernels: the grid column by column, the prefix, the digests. So the keys
// of one grid column are neighbours, and from one query of a grid row to the next the relative
// bias moves by one column (see digest_bias.h).
inline __attribute__((always_inline)) void order_keys(const DigestArgs& a, uint32_t* index) {
  int64_t k = 0;
  for (int64_t x = 0; x < a.grid_w; ++x) {
    for (int64_t y = 0; y < a.grid_h; ++y) index[k++] = (uint32_t)(a.prefix + y * a.grid_w + x);
  }
  for (int64_t i = 0; i < a.prefix; ++i) index[k++] = (uint32_t)i;
  for (; k < a.keys(); ++k) index[k] = (uint32_t)k;
}

// Rows of K or V of one image and head, or of their gradients, in the order of the kernels.
template <class S>
struct KeyRows {
  const uint32_t* index;  // among the tokens, then the digests
  int64_t tokens;
  S *token, *digest;
  int64_t token_stride, digest_stride;
  S* row(int64_t k) const {
    const int64_t j = index[k];
    return j < tokens ? token + j * token_stride : digest + (j - tokens) * digest_stride;
  }
};
// `which`: 0 for K, 1 for V.
template <class S>
XATTN_INLINE KeyRows<const S> key_rows(const DigestArgs& a, const uint32_t* index, int64_t b,
                                       int64_t head, int which) {
  const int64_t at = which * a.channels() + head * a.head_dim;
  return {index,
          a.tokens,
          (const S*)a.qkv + b * a.qkv_stride[0] + a.channels() + at,
          (const S*)a.digest_kv + b * a.digest_stride[0] + at,
          a.qkv_stride[1],
          a.digest_stride[1]};
}

// Dropout factors of queries [i0, i0 + rows) and keys [first, first + count) into out[i - base][:],
// where `base` is i0 rounded down to a multiple of 4, as the counter goes; whole vectors of floats.
template <class T>
void dropout_factors(const DigestArgs& a, const uint32_t* index, uint64_t unit, int64_t i0,
                     int64_t rows, int64_t first, int64_t count, T* out, int64_t stride) {
  constexpr int lanes = Lanes<float>::n;
  const double scaled = a.dropout_p * 4294967296.0;
  const Dropout dropout{{a.dropout_key[0], a.dropout_key[1]},
                        scaled >= 4294967295.0 ? 4294967295u : (uint32_t)scaled,
                        1.0 / (1.0 - a.dropout_p)};
  for (int64_t i = i0 / 4 * 4; i < i0 + rows; i += 4, out += 4 * stride) {
    for (int64_t j = 0; j < count; j += lanes) {
      keep_weights(dropout, load(index + first + j) + (uint32_t)(i / 4 * a.keys()),
                   splat((uint32_t)unit), splat((uint32_t)(unit >> 32)), out + j, stride);
    }
  }
}

}  // namespace xattn::XATTN_ISA::digest
