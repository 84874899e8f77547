// The two products that everything here is made of, cut into register tiles.
#pragma once

#include "common/loops.h"

namespace xattn::XATTN_ISA::clsattn {

// A tile of accumulators that fills the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 6, kColumns = 4;
#else
constexpr int kRows = 3, kColumns = 4;
#endif

// Rows of a matrix: in scratch, padded with zeros to whole vectors, or in memory.
template <class S>
struct Matrix {
  const S* data;
  int64_t row;  // distance of two rows

  const S* at(int64_t r) const { return data + r * row; }
};

// A matrix whose values are read one by one: value (r, k) is at data + r * row + k * step.
template <class T>
struct Factors {
  const T* data;
  int64_t row, step;
};

// acc[r * C + c] += x(r) * w(c). The fewer of the two stay in registers: beside R * C sums there is
// room for no more.
template <int R, int C, class V, class X, class W>
XATTN_INLINE void outer_product(V (&acc)[R * C], X x, W w) {
  if constexpr (R < C) {
    V kept[R];
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) kept[r] = x(r);
    XATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const V other = w(c);
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) acc[r * C + c] += kept[r] * other;
    }
  } else {
    V kept[C];
    XATTN_UNROLL
    for (int c = 0; c < C; ++c) kept[c] = w(c);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const V other = x(r);
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) acc[r * C + c] += other * kept[c];
    }
  }
}

// The tile functions are not inlined: one copy for all products, which would take minutes to
// compile otherwise. f(Int<R>, Int<C>) of a tile of that size.
template <class F>
XATTN_INLINE void with_tile(int64_t rows, int64_t columns, F f) {
  with_constant<kRows>(rows, [&](auto r) XATTN_LAMBDA_INLINE {
    with_constant<kColumns>(columns, [&](auto c) XATTN_LAMBDA_INLINE { f(r, c); });
  });
}

// out[r * columns + c] = x(r) . w(c) over n channels, lanes are channels; whole vectors of x are
// read.
template <class T, class S>
__attribute__((noinline)) void dot_tile(Matrix<T> x, int64_t rows, Matrix<S> w, int64_t columns,
                                        int64_t n, T* out) {
  constexpr int L = Lanes<T>::n;
  with_tile(rows, columns, [&](auto height, auto width) XATTN_LAMBDA_INLINE {
    constexpr int R = decltype(height)::value, C = decltype(width)::value;
    vec<T> acc[R * C] = {};
    const auto step = [&](int64_t at, auto get) XATTN_LAMBDA_INLINE {
      outer_product<R, C>(
          acc, [&](int r) XATTN_LAMBDA_INLINE { return load(x.at(r) + at); },
          [&](int c) XATTN_LAMBDA_INLINE { return get(w.at(c) + at); });
    };
    int64_t at = 0;
    for (; at + L <= n; at += L) {
      step(at, [](const S* p) XATTN_LAMBDA_INLINE { return load(p); });
    }
    if (at < n) step(at, [&](const S* p) XATTN_LAMBDA_INLINE { return load_n(p, n - at); });
    fold_each<Add>(acc, out);
  });
}

// put(r, c, count, values): x(r) . w(c + i) for i < count, for all r < rows and c < columns.
template <class T, class S, class Put>
XATTN_INLINE void dot_products(Matrix<T> x, int64_t rows, Matrix<S> w, int64_t columns, int64_t n,
                               Put put) {
  T out[kRows * kColumns + Lanes<T>::n];
  for_groups(rows, kRows, [&](int64_t r, int64_t height) XATTN_LAMBDA_INLINE {
    for_groups(columns, kColumns, [&](int64_t c, int64_t width) XATTN_LAMBDA_INLINE {
      dot_tile(Matrix<T>{x.at(r), x.row}, height, Matrix<S>{w.at(c), w.row}, width, n, out);
      for (int64_t i = 0; i < height; ++i) put(r + i, c, width, out + i * width);
    });
  });
}

// Where a product goes: `rows` of n values in memory, or rows in scratch, which take whole vectors
// in place of what they held (`scratch`) or besides (`sums`).
template <class O>
struct Into {
  O* data;
  int64_t row;  // distance of two rows
  double scale;
  bool whole, add;

  static Into rows(O* data, int64_t row, double scale = 1) {
    return {data, row, scale, false, false};
  }
  static Into scratch(O* data, int64_t row) { return {data, row, 1, true, false}; }
  static Into sums(O* data, int64_t row) { return {data, row, 1, true, true}; }
};

// out[r][c] (+)= scale sum over k < steps of a(r, k) b(k), vectors c of b; left: how many values
// the only column has where it is not whole.
template <class O, class T, class S>
__attribute__((noinline)) void multiply_tile(Into<O> out, Factors<T> a, int64_t rows, int64_t steps,
                                             Matrix<S> b, int64_t columns, int64_t left) {
  constexpr int L = Lanes<T>::n;
  const T scale = (T)out.scale;
  const auto tile = [&](auto height, auto width, auto get) XATTN_LAMBDA_INLINE {
    constexpr int R = decltype(height)::value, C = decltype(width)::value;
    vec<T> acc[R * C] = {};
    for (int64_t k = 0; k < steps; ++k) {
      outer_product<R, C>(
          acc, [&](int r) XATTN_LAMBDA_INLINE { return splat(a.data[r * a.row + k * a.step]); },
          [&](int c) XATTN_LAMBDA_INLINE { return get(b.at(k) + c * L); });
    }
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) {
        O* to = out.data + r * out.row + c * L;
        const vec<T> v = acc[r * C + c] * scale;
        if (left < L && !out.whole) {
          store_n(to, v, left);
        } else {
          store(to, out.add ? load(to) + v : v);
        }
      }
    }
  };
  if (left < L) {
    return with_constant<kRows>(rows, [&](auto height) XATTN_LAMBDA_INLINE {
      tile(height, Int<1>{}, [&](const S* p) XATTN_LAMBDA_INLINE { return load_n(p, left); });
    });
  }
  with_tile(rows, columns, [&](auto height, auto width) XATTN_LAMBDA_INLINE {
    tile(height, width, [](const S* p) XATTN_LAMBDA_INLINE { return load(p); });
  });
}

// out[r] (+)= scale sum over k < steps of a(r, k) b(k), rows of n channels.
template <class O, class T, class S>
XATTN_INLINE void multiply(Into<O> out, Factors<T> a, int64_t rows, int64_t steps, Matrix<S> b,
                           int64_t n) {
  constexpr int L = Lanes<T>::n;
  const auto of_columns = [&](int64_t z, int64_t width, int64_t left) XATTN_LAMBDA_INLINE {
    for_groups(rows, kRows, [&](int64_t r, int64_t height) XATTN_LAMBDA_INLINE {
      Into<O> to = out;
      to.data += r * out.row + z * L;
      multiply_tile(to, Factors<T>{a.data + r * a.row, a.row, a.step}, height, steps,
                    Matrix<S>{b.data + z * L, b.row}, width, left);
    });
  };
  for_groups(n / L, kColumns,
             [&](int64_t z, int64_t width) XATTN_LAMBDA_INLINE { of_columns(z, width, L); });
  if (n % L) of_columns(n / L, 1, n % L);
}

}  // namespace xattn::XATTN_ISA::clsattn
