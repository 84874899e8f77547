// The two products that everything here is made of, cut into register tiles.
#pragma once

#include "common/loops.h"

namespace xattn::XATTN_ISA::clsattn {

// A tile of accumulators that fills the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 6, kColumns = 4;
#else
constexpr int kRows = 4, kColumns = 3;
#endif

// Rows of a matrix: in scratch, padded with zeros to whole vectors, or in memory.
template <class S>
struct Matrix {
  const S* data;
  int64_t row;  // distance of two rows

  const S* at(int64_t r) const { return data + r * row; }
};

// out[r * C + c] = x(r) . w(c) over n channels, lanes are channels; whole vectors of x are read.
// Not inlined: one copy for all products, which would take minutes to compile otherwise.
template <int R, int C, class T, class S>
__attribute__((noinline)) void dot_tile(Matrix<T> x, Matrix<S> w, int64_t n, T* out) {
  constexpr int L = Lanes<T>::n;
  vec<T> acc[R * C] = {};
  const auto step = [&](int64_t at, auto get) XATTN_LAMBDA_INLINE {
    vec<T> wv[C];
    XATTN_UNROLL
    for (int c = 0; c < C; ++c) wv[c] = get(w.at(c) + at);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto xv = load(x.at(r) + at);
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) acc[r * C + c] += xv * wv[c];
    }
  };
  int64_t at = 0;
  for (; at + L <= n; at += L) {
    step(at, [](const S* p) XATTN_LAMBDA_INLINE { return load(p); });
  }
  if (at < n) step(at, [&](const S* p) XATTN_LAMBDA_INLINE { return load_n(p, n - at); });
  fold_each<Add>(acc, out);
}

// put(r, c, count, values): x(r) . w(c + i) for i < count, for all r < rows and c < columns.
template <class T, class S, class Put>
XATTN_INLINE void dot_products(Matrix<T> x, int64_t rows, Matrix<S> w, int64_t columns, int64_t n,
                               Put put) {
  if (rows == 0) return;
  for_columns<kRows, 1>(rows, [&](auto height, int64_t r) XATTN_LAMBDA_INLINE {
    for_rows<kColumns>(columns, [&](auto width, int64_t c) XATTN_LAMBDA_INLINE {
      constexpr int R = decltype(height)::value, C = decltype(width)::value;
      T out[R * C + Lanes<T>::n];
      dot_tile<R, C>(Matrix<T>{x.at(r), x.row}, Matrix<S>{w.at(c), w.row}, n, out);
      for (int i = 0; i < R; ++i) put(r + i, c, width, out + i * C);
    });
  });
}

// A matrix whose values are read one by one: value (r, k) is at data + r * row + k * step.
template <class T>
struct Factors {
  const T* data;
  int64_t row, step;
};

// put(r, z, v): v = sum over k < steps of a(r, k) b(k), vector z of n channels.
template <class T, class S, class Put>
XATTN_INLINE void multiply(Factors<T> a, int64_t rows, int64_t steps, Matrix<S> b, int64_t n,
                           Put put) {
  constexpr int L = Lanes<T>::n;
  const auto columns = [&](auto width, int64_t z, auto get) XATTN_LAMBDA_INLINE {
    constexpr int C = decltype(width)::value;
    for_rows<kRows>(rows, [&](auto height, int64_t r) XATTN_LAMBDA_INLINE {
      constexpr int R = decltype(height)::value;
      vec<T> acc[R][C] = {};
      for (int64_t k = 0; k < steps; ++k) {
        vec<T> bv[C];
        XATTN_UNROLL
        for (int c = 0; c < C; ++c) bv[c] = get(b.at(k) + (z + c) * L);
        XATTN_UNROLL
        for (int i = 0; i < R; ++i) {
          const auto av = splat(a.data[(r + i) * a.row + k * a.step]);
          XATTN_UNROLL
          for (int c = 0; c < C; ++c) acc[i][c] += av * bv[c];
        }
      }
      XATTN_UNROLL
      for (int i = 0; i < R; ++i) {
        XATTN_UNROLL
        for (int c = 0; c < C; ++c) put(r + i, z + c, acc[i][c]);
      }
    });
  };
  const int64_t whole = n / L, left = n % L;
  if (whole > 0) {
    for_columns<kColumns, 1>(whole, [&](auto width, int64_t z) XATTN_LAMBDA_INLINE {
      columns(width, z, [](const S* p) XATTN_LAMBDA_INLINE { return load(p); });
    });
  }
  if (left > 0) {
    columns(Int<1>{}, whole, [&](const S* p) XATTN_LAMBDA_INLINE { return load_n(p, left); });
  }
}

}  // namespace xattn::XATTN_ISA::clsattn
