// The products of attention heads: tokens [t][channel] in scratch against a D x D matrix a head.
//
// A head begins at any channel of a token's row, so its last vector may hold channels of the next
// head: those lanes compute something that nobody reads, or that the next head overwrites. Two
// heads of half a vector are taken together instead, each row of their matrices in one vector.
#pragma once

#include "common/channel_group.h"
#include "common/loops.h"
#include "common/tiles.h"

namespace xattn::XATTN_ISA::convrel {

// Rows of a tile of kColumns vectors: with the operands they fill the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostColumns = 4;
template <int kColumns>
constexpr int kTileRows = kColumns == 1   ? 14
                          : kColumns == 2 ? 12
                          : kColumns == 3 ? 8
                                          : 6;
#else
constexpr int kMostColumns = 3;
template <int kColumns>
constexpr int kTileRows = kColumns == 1   ? 8
                          : kColumns == 2 ? 5
                                          : 4;
#endif

// Both halves of the result are value `kIndex` of that half of v.
template <int kIndex, class V, int... I>
XATTN_INLINE V spread_in_halves(V v, Indices<I...>) {
  constexpr int half = sizeof...(I) / 2;
  return __builtin_shufflevector(v, v, ((I / half) * half + kIndex)...);
}

template <class T>
struct Heads {
  static constexpr int L = Lanes<T>::n;
  static constexpr int kHalf = L / 2;
  int64_t count, dim;
  int64_t stride;  // of a token in scratch
  bool paired;
  int64_t columns;  // vectors of a matrix row

  Heads(int64_t count, int64_t dim, int64_t stride)
      : count(count),
        dim(dim),
        stride(stride),
        paired(dim == kHalf && count % 2 == 0),
        columns((dim + L - 1) / L) {}

  // Values of all matrices, and where entry (i, j) of head h is among them.
  int64_t size() const { return (paired ? count / 2 : count) * dim * columns * L; }
  XATTN_MEMBER int64_t at(int64_t h, int64_t i, int64_t j) const {
    return paired ? (h / 2 * dim + i) * L + h % 2 * kHalf + j : (h * dim + i) * columns * L + j;
  }

  // Whether a head's vectors end where the head ends.
  bool exact() const { return paired || dim % L == 0; }

  // sums(h)[i][:] += sum over t of left[t][i] * right[t][:].
  void add_outer(int64_t tokens, TokenView<T> left, TokenView<T> right, T* sums) const {
    if (paired) return add_outer_pairs(tokens, left, right, sums);
    for (int64_t h = 0; h < count; ++h) {
      add_outer_of(tokens, left, right, sums + at(h, 0, 0));
      left.data += dim;
      right.data += dim;
    }
  }

  // out[t][:] = sum over i of in[t][i] * matrices(h)[i][:]; `out`, tokens of `stride`, is another
  // array than `in`.
  void multiply(int64_t tokens, TokenView<T> in, const T* matrices, T* out) const {
    if (paired) return multiply_pairs(tokens, in, matrices, out);
    for (int64_t h = 0; h < count; ++h) {
      multiply_one(tokens, in, matrices + at(h, 0, 0), out + h * dim);
      in.data += dim;
    }
  }

  // matrices(h)[i][:] *= factor of channel i of head h.
  void scale_rows(const T* factor, T* matrices) const {
    for (int64_t h = 0; h < count; h += paired ? 2 : 1) {
      for (int64_t i = 0; i < dim; ++i) {
        vec<T> f = splat(factor[h * dim + i]);
        if (paired) {
          const auto other = splat(factor[(h + 1) * dim + i]);
          for (int l = kHalf; l < L; ++l) f[l] = other[l];
        }
        T* row = matrices + at(h, i, 0);
        for (int64_t j = 0; j < columns * L; j += L) store(row + j, load(row + j) * f);
      }
    }
  }

  // to(h)[j][i] = from[i][j] * factor, where the rows of `from` are `row` values apart.
  void transpose_head(int64_t h, const T* from, int64_t row, T factor, T* to) const {
    for (int64_t i = 0; i < dim; i += L) {
      for (int64_t j = 0; j < dim; j += L) {
        vec<T> square[L];
        XATTN_UNROLL
        for (int r = 0; r < L; ++r) {
          square[r] = i + r < dim ? load_n(from + (i + r) * row + j, dim - j) * factor : vec<T>{};
        }
        transpose(square);
        const int64_t rows = min_of<int64_t>(L, dim - j);
        for (int64_t r = 0; r < rows; ++r) store_n(to + at(h, j + r, i), square[r], dim - i);
      }
    }
  }

 private:
  __attribute__((noinline)) void add_outer_of(int64_t tokens, TokenView<T> left, TokenView<T> right,
                                              T* sums) const {
    const int64_t row = columns * L;
    for_columns<kMostColumns, 1>(columns, [&](auto size, int64_t c) XATTN_LAMBDA_INLINE {
      constexpr int C = decltype(size)::value;
      for_columns<kTileRows<C>, 1>(dim, [&](auto rows, int64_t i) XATTN_LAMBDA_INLINE {
        constexpr int R = decltype(rows)::value;
        vec<T> tile[R][C] = {};
        tile_broadcast<Single<T>>(tile, left.data + i, 1, left.stride, right.data + c * L,
                                  right.stride, L, tokens);
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          XATTN_UNROLL
          for (int k = 0; k < C; ++k) {
            T* sum = sums + (i + r) * row + (c + k) * L;
            store(sum, load(sum) + tile[r][k]);
          }
        }
      });
    });
  }

  __attribute__((noinline)) void multiply_one(int64_t tokens, TokenView<T> in, const T* matrix,
                                              T* out) const {
    const int64_t row = columns * L;
    for_columns<kMostColumns, 1>(columns, [&](auto size, int64_t c) XATTN_LAMBDA_INLINE {
      constexpr int C = decltype(size)::value;
      for_columns<kTileRows<C>, 1>(tokens, [&](auto rows, int64_t t) XATTN_LAMBDA_INLINE {
        constexpr int R = decltype(rows)::value;
        vec<T> tile[R][C] = {};
        tile_broadcast<Single<T>>(tile, in.data + t * in.stride, in.stride, 1, matrix + c * L, row,
                                  L, dim);
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          XATTN_UNROLL
          for (int k = 0; k < C; ++k) store(out + (t + r) * stride + (c + k) * L, tile[r][k]);
        }
      });
    });
  }

  // acc[i] += value i of each half of `left`, times `right`.
  template <int kIndex = 0>
  XATTN_INLINE void add_spread(vec<T> (&acc)[kHalf], vec<T> left, vec<T> right) {
    if constexpr (kIndex < kHalf) {
      acc[kIndex] += spread_in_halves<kIndex>(left, typename MakeIndices<L>::type{}) * right;
      add_spread<kIndex + 1>(acc, left, right);
    }
  }
  // The sum over i of value i of each half of `in`, times rows[i], in two chains.
  template <int kIndex = 0>
  XATTN_INLINE void add_products(vec<T> (&acc)[2], vec<T> in, const vec<T> (&rows)[kHalf]) {
    if constexpr (kIndex < kHalf) {
      acc[kIndex % 2] +=
          spread_in_halves<kIndex>(in, typename MakeIndices<L>::type{}) * rows[kIndex];
      add_products<kIndex + 1>(acc, in, rows);
    }
  }

  __attribute__((noinline)) void add_outer_pairs(int64_t tokens, TokenView<T> left,
                                                 TokenView<T> right, T* sums) const {
    for (int64_t pair = 0; pair < count / 2; ++pair, sums += dim * L) {
      const T *a = left.data + pair * L, *b = right.data + pair * L;
      vec<T> acc[kHalf] = {};
      for (int64_t t = 0; t < tokens; ++t) {
        add_spread(acc, load(a + t * left.stride), load(b + t * right.stride));
      }
      XATTN_UNROLL
      for (int i = 0; i < kHalf; ++i) store(sums + i * L, load(sums + i * L) + acc[i]);
    }
  }

  __attribute__((noinline)) void multiply_pairs(int64_t tokens, TokenView<T> in, const T* matrices,
                                                T* out) const {
    for (int64_t pair = 0; pair < count / 2; ++pair, in.data += L, out += L, matrices += dim * L) {
      vec<T> rows[kHalf];
      XATTN_UNROLL
      for (int i = 0; i < kHalf; ++i) rows[i] = load(matrices + i * L);
      for (int64_t t = 0; t < tokens; ++t) {
        vec<T> acc[2] = {};
        add_products(acc, load(in.data + t * in.stride), rows);
        store(out + t * stride, acc[0] + acc[1]);
      }
    }
  }
};

}  // namespace xattn::XATTN_ISA::convrel
