// One head of one window: gathering it, its softmax and its products, a tile of queries at a time.
#pragma once

#include "common/dropout.h"
#include "common/loops.h"
#include "common/pack.h"
#include "common/tiles.h"
#include "ipsa.h"
#include "ipsa_window.h"

namespace xattn::XATTN_ISA {

// Accumulators kRows x kMaxColumns fill the register file. 7 divides the 49 tokens of CAT; 6 leaves
// one of them, the lone row, to a tile of its own, which has more columns.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowsOf49 = 7, kRowsOfAny = 8, kMaxColumns = 3;
constexpr bool kFewMisses = false;
#else
constexpr int kRowsOf49 = 6, kRowsOfAny = 6, kMaxColumns = 2;
// A core that waits on some 20 misses stops at the next prefetch: ask for few lines at a time, and
// for those that will be written too.
constexpr bool kFewMisses = true;
#endif
constexpr int columns_beside(int rows) { return rows == 1 ? 6 : kMaxColumns; }

// S: storage type. M: multiply policy. kTokens, kHeadDim: sizes known at compile time, or 0.
template <class S, class M, int kRows, int kTokens, int kHeadDim>
struct Unit {
  using Storage = S;
  using Multiply = M;
  using T = typename M::Acc;
  using Elem = typename M::Elem;
  using P = Pack<S, M>;
  using Weight = typename M::Storage;  // of a softmax weight that a tile multiplies
  using V = vec<T>;
  static constexpr int L = kLanesOf<M>;
  static constexpr int kTileRows = kRows;
  static constexpr int kStep = M::kStep;
  static constexpr bool kPairs = kStep == 2;
  // Vectors of keys without the tail, where known: few enough stay in registers.
  static constexpr int kColumnsKnown = kTokens ? (kTokens - (kTokens % L == 1) + L - 1) / L : 0;
  static constexpr bool kLoneRow = kTokens % kRows == 1;
  // A value for each row of a tile, read and written by the vector.
  static constexpr int kPerRow = (kRows + L - 1) / L * L + L;

  const IpsaArgs& args;

  int64_t n() const { return kTokens ? kTokens : args.tokens(); }
  int64_t d() const { return kHeadDim ? kHeadDim : args.head_dim; }
  int64_t rows() const { return kLoneRow ? n() : round_up(n(), kRows); }  // padded queries
  bool has_tail() const { return n() % L == 1 && n() > 1; }
  int64_t columns() const { return round_up(n() - has_tail(), L); }  // keys in vectors
  int64_t weight_stride() const { return round_up(max_of(n(), rows()) + 1, 2 * L); }
  int64_t steps_d() const { return (d() + M::kStep - 1) / M::kStep; }  // inner steps over channels
  int64_t steps_n() const { return (n() + M::kStep - 1) / M::kStep; }  // inner steps over tokens
  int64_t stride_d() const { return round_up(steps_d(), L); }          // row of Elems
  int64_t width_d() const { return round_up(d(), L); }                 // row of channels
  // A dense term of the logits: [rows][columns], a vector of slack, then the tail key's column.
  int64_t tail_at() const { return rows() * columns() + L; }
  int64_t dense_size() const { return tail_at() + round_up(rows(), L) + L; }

  // ---------------------------------------------------------------- gather

  // out[t][:] = row of token t, for tiles that broadcast it; rows beyond n are zero.
  void gather_rows(const TokenRows<S>& tokens, Elem* out) const {
    P::rows([&](int64_t t) XATTN_LAMBDA_INLINE { return tokens.row(t); }, n(), rows(), d(),
            stride_d(), out);
  }

  // out[step][key] = element `step` of that key's row: lanes are keys. The tail key is left out.
  void gather_transposed(const TokenRows<S>& tokens, Elem* out) const {
    const int64_t stride = columns(), count = n() - has_tail(), dim = d();
    for (int64_t key = 0; key < count; key += L) {
      for (int64_t c = 0; c * L < stride_d(); ++c) {
        vec<Elem> square[L];
        XATTN_UNROLL
        for (int i = 0; i < L; ++i) {
          square[i] = key + i < count ? P::elems(tokens.row(key + i), c, dim) : vec<Elem>{};
        }
        transpose(square);
        const int64_t steps = min_of<int64_t>(L, steps_d() - c * L);
        XATTN_UNROLL
        for (int i = 0; i < L; ++i) {
          if (i < steps) store(out + (c * L + i) * stride + key, square[i]);
        }
      }
    }
  }

  // out[step][:] = channels of the `kStep` tokens of a step: lanes are channels.
  void gather_values(const TokenRows<S>& tokens, Elem* out) const {
    P::values([&](int64_t t) XATTN_LAMBDA_INLINE { return tokens.row(t); }, n(), n(), d(),
              width_d(), out);
  }

  // ---------------------------------------------------------------- scores

  // out[i] = sum over channels of rows[i] * tail key's row, for all padded queries.
  void tail_products(const Elem* rows_in, const S* tail, T* out) const {
    vec<Elem> key[kHeadDim ? (kHeadDim / M::kStep + L - 1) / L : 1];
    const int64_t vectors = stride_d() / L, dim = d(), stride = stride_d();
    if constexpr (kHeadDim > 0) {
      for (int64_t c = 0; c < vectors; ++c) key[c] = P::elems(tail, c, dim);
    }
    for (int64_t i = 0; i < rows(); i += L) {
      V sums[L] = {};
      XATTN_UNROLL
      for (int r = 0; r < L; ++r) {
        if (i + r >= rows()) continue;
        for (int64_t c = 0; c < vectors; ++c) {
          const auto k = kHeadDim > 0 ? key[kHeadDim > 0 ? c : 0] : P::elems(tail, c, dim);
          sums[r] = M::fma(sums[r], load(rows_in + (i + r) * stride + c * L), k);
        }
      }
      fold_each<Add>(sums, out + i);
    }
  }

  // f(Int<rows>, first row) for all tiles of queries.
  template <class F>
  XATTN_MEMBER void for_tiles(F f) const {
    for (int64_t i0 = 0; i0 + kLoneRow < n(); i0 += kRows) f(Int<kRows>{}, i0);
    if constexpr (kLoneRow) f(Int<1>{}, kTokens - 1);
  }

  static XATTN_MEMBER V exp2(V x) { return exp2_weight<M>(x); }

  struct Logits {
    T scale;           // times log2 e
    const T* bias;     // dense [rows][columns], then the tail column
    const T* mask;     // the same layout, or null
    const Elem* keys;  // [steps_d][columns]
    T* tail;           // [rows] products with the tail key
  };

  // Logits of a tile of queries in powers of two, and the softmax of each row: unnormalised weights
  // into `weights` (row stride weight_stride), the reciprocals of their sums into `inverse`.
  template <int R, class W>  // W: Weight in the forward, T in the backward
  XATTN_MEMBER void softmax_tile(const Logits& logits, const Elem* queries, int64_t i0, T* spill,
                                 W* weights, T* inverse) const {
    const int64_t columns = this->columns(), stride = weight_stride();
    const T* bias = logits.bias + i0 * columns;
    const T* mask = logits.mask ? logits.mask + i0 * columns : nullptr;
    alignas(64) T top[kPerRow], tails[kPerRow], sums[kPerRow];  // per row of the tile
    alignas(64) W tail_weights[kPerRow];

    // From the logits of each row, given as vectors by logit(r, c), to its weights.
    const auto softmax = [&](auto vectors, auto logit) XATTN_LAMBDA_INLINE {
      V rows[R];
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        rows[r] = logit(r, 0);
        XATTN_UNROLL
        for (int64_t c = 1; c < vectors; ++c) rows[r] = vmax(rows[r], logit(r, c));
      }
      fold_each<Max>(rows, top);
      if (has_tail()) {
        const int64_t at = tail_at() + i0;
        XATTN_UNROLL
        for (int r = 0; r < R; r += L) {
          V tail = load(logits.tail + i0 + r) * logits.scale + load(logits.bias + at + r);
          if (mask) tail += load(logits.mask + at + r);
          store(tails + r, tail);
          store(top + r, vmax(load(top + r), tail));
        }
      }
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const V highest = splat(top[r]);
        rows[r] = V{};
        XATTN_UNROLL
        for (int64_t c = 0; c < vectors; ++c) {
          const V e = exp2(logit(r, c) - highest);
          rows[r] += e;
          store(weights + r * stride + c * L, e);
        }
      }
      fold_each<Add>(rows, sums);
    };

    constexpr int kColumns = kColumnsKnown;
    if constexpr (kColumns > 0 && kColumns <= columns_beside(R)) {
      V acc[R][kColumns] = {};
      tile_broadcast<M>(acc, queries + i0 * stride_d(), stride_d(), 1, logits.keys, columns, L,
                        steps_d());
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        XATTN_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          acc[r][c] = acc[r][c] * logits.scale + load(bias + r * columns + c * L);
        }
      }
      if (mask) {
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          XATTN_UNROLL
          for (int c = 0; c < kColumns; ++c) acc[r][c] += load(mask + r * columns + c * L);
        }
      }
      softmax(kColumns, [&](int r, int64_t c) XATTN_LAMBDA_INLINE { return acc[r][c]; });
    } else {
      for_columns<columns_beside(R), 1>(
          columns / L, [&](auto group, int64_t first) XATTN_LAMBDA_INLINE {
            constexpr int C = decltype(group)::value;
            V acc[R][C] = {};
            tile_broadcast<M>(acc, queries + i0 * stride_d(), stride_d(), 1,
                              logits.keys + first * L, columns, L, steps_d());
            XATTN_UNROLL
            for (int r = 0; r < R; ++r) {
              XATTN_UNROLL
              for (int c = 0; c < C; ++c) {
                const int64_t at = r * columns + (first + c) * L;
                V logit = acc[r][c] * logits.scale + load(bias + at);
                if (mask) logit += load(mask + at);
                store(spill + at, logit);
              }
            }
          });
      softmax(columns / L, [&](int r, int64_t c)
                               XATTN_LAMBDA_INLINE { return load(spill + r * columns + c * L); });
    }

    XATTN_UNROLL
    for (int r = 0; r < R; r += L) {
      V sum = load(sums + r);
      if (has_tail()) {
        const V e = exp2(load(tails + r) - load(top + r));
        store(tail_weights + r, e);
        sum += e;
      }
      store(inverse + r, 1 / sum);
    }
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      if (has_tail()) weights[r * stride + columns] = tail_weights[r];
      if (kPairs && n() % 2 == 1) weights[r * stride + n()] = W{};  // fills the last pair
    }
  }

  // Channels [c, c + L) of a row.
  XATTN_MEMBER void store_channels(S* row, int64_t c, V value) const {
    if constexpr (kHeadDim > 0 && kHeadDim % L == 0) {
      store(row + c, value);
    } else {
      store_n(row + c, value, d() - c);
    }
  }
  // Whole rows [from, to) of a tensor that will be written, `offset[t]` times `stride` elements on.
  XATTN_MEMBER void prefetch_written(const S* base, const int64_t* offset, int64_t stride,
                                     int64_t from, int64_t to) const {
    if constexpr (kFewMisses) {
      for (int64_t t = from; t < min_of(to, n()); ++t) {
        if (offset[t] < 0) continue;
        const char* row = (const char*)(base + offset[t] * stride);
        for (int64_t at = 0; at < d() * (int64_t)sizeof(S); at += 64) prefetch_to_write(row + at);
      }
    }
  }

  // ---------------------------------------------------------------- products over tokens

  // out(row, channels) = factor(row) * sum over steps of a(row, step) * values(step, channels) for
  // R rows; `a` strided as tile_broadcast takes it.
  template <int R, class Factor, class Out>
  XATTN_MEMBER void weighted_sum(const Elem* a, int64_t a_row, int64_t a_step, const Elem* values,
                                 Factor factor, Out out) const {
    for_columns<columns_beside(R), 1>(
        width_d() / L, [&](auto group, int64_t first) XATTN_LAMBDA_INLINE {
          constexpr int C = decltype(group)::value;
          V acc[R][C] = {};
          tile_broadcast<M>(acc, a, a_row, a_step, values + first * L, width_d(), L, steps_n());
          XATTN_UNROLL
          for (int r = 0; r < R; ++r) {
            const T by = factor(r);
            XATTN_UNROLL
            for (int c = 0; c < C; ++c) out(r, (first + c) * L, acc[r][c] * by);
          }
        });
  }
};

}  // namespace xattn::XATTN_ISA
