// The matrix products of CPSA over vectors whose lanes are channels, and what happens to a tile of
// results: stored, packed, added to the image, summed over the lanes.
#pragma once

#include "common/loops.h"
#include "cpsa_tokens.h"

namespace xattn::XATTN_ISA {

// Accumulators of a tile, kRows x kColumns, which with their operands fill the register file. The
// double kernels exist for checking and keep the small tile.
template <class M>
struct TileShape {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kRows = sizeof(typename M::Acc) == 4 ? 4 : 2;
#else
  static constexpr int kRows = 2;
#endif
  static constexpr int kColumns = 6;
};

// Element vectors of a factor: entry (i, k) at data + i * outer + k * step, k the inner dimension.
template <class M>
struct Factor {
  const typename M::Elem* data;
  int64_t outer, step;
};

// Tokens as a factor: rows are tokens, inner dimension elements; or the other way round.
template <class M>
XATTN_INLINE Factor<M> over_elements(const Tokens<M>& t) {
  return {t.by_element, t.token_stride, kLanesOf<M>};
}
template <class M>
XATTN_INLINE Factor<M> over_tokens(const Tokens<M>& t) {
  return {t.by_token, kLanesOf<M>, t.step_stride};
}

// sink(tile, row, column) with tile[r][c] = sum_k a(row + r, k) * b(column + c, k), lane by lane.
template <class M, class Sink>
__attribute__((noinline)) void product(int64_t rows, const Factor<M>& a, int64_t columns,
                                       const Factor<M>& b, int64_t steps, const Sink& sink) {
  using Shape = TileShape<M>;
  for_columns<Shape::kColumns, M::kStep>(columns, [&](auto c, int64_t column) XATTN_LAMBDA_INLINE {
    for_rows<Shape::kRows>(rows, [&](auto r, int64_t row) XATTN_LAMBDA_INLINE {
      acc_vec<M> tile[decltype(r)::value][decltype(c)::value] = {};
      tile_lanes<M>(tile, a.data + row * a.outer, a.outer, a.step, b.data + column * b.outer,
                    b.outer, b.step, steps);
      sink(tile, row, column);
    });
  });
}

// A weight matrix as `linear` reads it: its outputs in the column groups of for_columns, within a
// group [step][output], so that a tile reads it from front to back.
template <class M>
struct PackedWeight {
  typename M::Elem* data;
  typename M::Acc* bias;  // [outputs]
  int64_t steps, outputs;
};

// sink(tile, token, output) with tile[t][o] = sum_k in(token + t, k) * weight(k, o) + bias[o]. The
// bias comes last: a large one would cost every partial sum its low bits.
template <class M, class Sink>
__attribute__((noinline)) void linear(int64_t tokens, const Factor<M>& in,
                                      const PackedWeight<M>& weight, const Sink& sink) {
  using Shape = TileShape<M>;
  for_rows<Shape::kRows>(tokens, [&](auto r, int64_t token) XATTN_LAMBDA_INLINE {
    constexpr int R = decltype(r)::value;
    const typename M::Elem* w = weight.data;
    for_columns<Shape::kColumns, M::kStep>(
        weight.outputs, [&](auto c, int64_t output) XATTN_LAMBDA_INLINE {
          constexpr int C = decltype(c)::value;
          acc_vec<M> turned[C][R] = {};
          tile_broadcast<M>(turned, w, 1, C, in.data + token * in.outer, in.step, in.outer,
                            weight.steps);
          acc_vec<M> tile[R][C];
          XATTN_UNROLL
          for (int t = 0; t < R; ++t) {
            XATTN_UNROLL
            for (int o = 0; o < C; ++o) tile[t][o] = turned[o][t] + splat(weight.bias[output + o]);
          }
          sink(tile, token, output);
          w += C * weight.steps;
        });
  });
}

// ---------------------------------------------------------------- sinks

// Stores tile entry (r, c) at out + r * row_stride + c * lanes, or adds it to what is there.
template <class T>
struct StoreSink {
  T* out;
  int64_t row_stride;
  bool add = false;

  template <int R, int C>
  XATTN_MEMBER void operator()(const vec<T> (&tile)[R][C], int64_t row, int64_t column) const {
    T* corner = out + row * row_stride + column * Lanes<T>::n;
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) {
        T* p = corner + r * row_stride + c * Lanes<T>::n;
        store(p, add ? load(p) + tile[r][c] : tile[r][c]);
      }
    }
  }
};

// Writes rows of results as tokens, in the orders that `out` has, each row times its own factor
// (a vector per row) where `row_scale` is given.
template <class M, bool kScaled = false>
struct TokenSink {
  using T = typename M::Acc;
  Tokens<M> out;
  const T* row_scale = nullptr;

  template <int R, int C>
  XATTN_MEMBER void operator()(const vec<T> (&unscaled)[R][C], int64_t row, int64_t column) const {
    constexpr int L = Lanes<T>::n;
    vec<T> tile[R][C];
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const vec<T> scale = kScaled ? load(row_scale + (row + r) * L) : vec<T>{};
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) tile[r][c] = kScaled ? unscaled[r][c] * scale : unscaled[r][c];
    }
    if constexpr (M::kStep == 1) {
      StoreSink<T>{out.by_element, out.token_stride}(tile, row, column);
    } else {
      if (out.by_element) write_pairs_of_elements(tile, row, column);
      if (out.by_token) write_pairs_of_tokens(tile, row, column);
    }
  }

 private:
  template <int R, int C>
  XATTN_MEMBER void write_pairs_of_elements(const vec<T> (&tile)[R][C], int64_t row,
                                            int64_t column) const {
    auto* p = out.by_element + row * out.token_stride + column / 2 * Lanes<T>::n;
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < C; c += 2) {
        store(p + r * out.token_stride + c / 2 * Lanes<T>::n, to_pair(tile[r][c], tile[r][c + 1]));
      }
    }
  }
  template <int R, int C>
  XATTN_MEMBER void write_pairs_of_tokens(const vec<T> (&tile)[R][C], int64_t row,
                                          int64_t column) const {
    if constexpr (R % 2 == 0) {  // rows come in even numbers: see Bundle
      auto* p = out.by_token + row / 2 * out.step_stride + column * Lanes<T>::n;
      XATTN_UNROLL
      for (int r = 0; r < R; r += 2) {
        XATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          store(p + r / 2 * out.step_stride + c * Lanes<T>::n, to_pair(tile[r][c], tile[r + 1][c]));
        }
      }
    }
  }
};

// Writes rows of results into the image. `addend` [row][column], where there is one, comes on top.
template <class S, class M, bool kAdd>
struct ImageSink {
  using T = typename M::Acc;
  const PatchView<S>* patch;  // [row]
  int64_t elements;
  const T* addend;
  int64_t addend_stride;
  // Tokens [row] that are read soon, or null: a few lines are asked for with every tile, because
  // many at once would stall.
  const PatchView<const S>* upcoming[2];

  template <int R, int C>
  XATTN_MEMBER void operator()(const vec<T> (&tile)[R][C], int64_t row, int64_t column) const {
    for (const PatchView<const S>* tokens : upcoming) {
      if (!tokens) continue;
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const PatchView<const S> next = tokens[row + r];
        XATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          if (M::kStep > 1 && column + c >= elements) break;
          prefetch_line_l2(next.data + next.offset[column + c]);
        }
      }
    }
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const PatchView<S> to = patch[row + r];
      const T* from = addend + (row + r) * addend_stride + column * Lanes<T>::n;
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) {
        if (M::kStep > 1 && column + c >= elements) break;  // the partner of an odd last element
        vec<T> value = tile[r][c];
        if constexpr (kAdd) value += load(from + c * Lanes<T>::n);
        store(to.data + to.offset[column + c], value);
      }
    }
  }
};

// Adds the sums over the lanes to the matrix `out`.
template <class T>
struct LaneSumSink {
  T* out;
  int64_t row_stride;

  template <int R, int C>
  XATTN_MEMBER void operator()(const vec<T> (&tile)[R][C], int64_t row, int64_t column) const {
    vec<T> entries[R * C];
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) entries[r * C + c] = tile[r][c];
    }
    T sums[R * C + Lanes<T>::n];
    fold_each<Add>(entries, sums);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) out[(row + r) * row_stride + column + c] += sums[r * C + c];
    }
  }
};

// The sum of an accumulator and all values of an element.
template <class V>
XATTN_INLINE V add_element(V acc, V values) {
  return acc + values;
}
#if defined(__AVX512BF16__)
XATTN_INLINE vfloat add_element(vfloat acc, vu32 pairs) {
  return Bf16Pairs::fma(acc, pairs, splat(0x3f803f80u));  // times (1, 1)
}
#endif

// out[p] += sum over tokens and lanes, of tokens by_token.
template <class M>
void add_token_sums(const Tokens<M>& t, int64_t steps, int64_t elements, typename M::Acc* out) {
  for (int64_t p = 0; p < elements; ++p) {
    const typename M::Elem* column = t.by_token + p * kLanesOf<M>;
    acc_vec<M> sum[2] = {};
    for (int64_t k = 0; k < steps; ++k) {
      sum[k % 2] = add_element(sum[k % 2], load(column + k * t.step_stride));
    }
    out[p] += sum_lanes(sum[0] + sum[1]);
  }
}

}  // namespace xattn::XATTN_ISA
