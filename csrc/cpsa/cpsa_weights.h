// Small matrices: the weights of CPSA, their products and their gradients, in the compute type.
#pragma once

#include "cpsa_products.h"

namespace xattn::XATTN_ISA {

// Row-major; rows padded to whole vectors with zeros.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;

  T* row(int64_t r) const { return data + r * stride; }
};

template <class T>
Matrix<T> new_matrix(Arena& arena, int64_t rows, int64_t columns) {
  const int64_t stride = round_up(columns, Lanes<T>::n);
  return {arena.take<T>(rows * stride), rows, columns, stride};
}

// n values of any storage type in the compute type; zeros where there are none (null).
template <class S, class T>
void read_values(const S* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += Lanes<T>::n) {
    store_n(to + i, from ? load_n(from + i, n - i) : vec<T>{}, n - i);
  }
}
template <class T, class S>
void write_values(const T* from, int64_t n, S* to) {
  for (int64_t i = 0; i < n; i += Lanes<T>::n) store_n(to + i, load_n(from + i, n - i), n - i);
}

// Rows of values, `stride` apart.
template <class S, class T>
void read_matrix(const S* from, int64_t stride, const Matrix<T>& m) {
  for (int64_t r = 0; r < m.rows; ++r) {
    read_values(from + r * stride, m.columns, m.row(r));
    for (int64_t c = m.columns; c < m.stride; ++c) m.row(r)[c] = 0;
  }
}

template <class T>
void transpose_into(const Matrix<T>& from, const Matrix<T>& to) {
  for (int64_t r = 0; r < to.rows; ++r) {
    for (int64_t c = 0; c < to.columns; ++c) to.row(r)[c] = from.row(c)[r];
    for (int64_t c = to.columns; c < to.stride; ++c) to.row(r)[c] = 0;
  }
}

// A left factor of multiply(): entry (i, k) at data + i * row + k * inner.
template <class T>
struct LeftFactor {
  const T* data;
  int64_t row, inner;
};
template <class T>
LeftFactor<T> plain(const Matrix<T>& m) {
  return {m.data, m.stride, 1};
}
template <class T>
LeftFactor<T> transposed(const Matrix<T>& m) {
  return {m.data, 1, m.stride};
}

// out = scale * left * right. The padding of `out` becomes zero with that of `right`.
template <class T>
void multiply(const LeftFactor<T>& left, const Matrix<T>& right, T scale, const Matrix<T>& out) {
  constexpr int L = Lanes<T>::n;
  for_columns<4, 1>(out.stride / L, [&](auto c, int64_t vector) XATTN_LAMBDA_INLINE {
    for_rows<4>(out.rows, [&](auto r, int64_t row) XATTN_LAMBDA_INLINE {
      constexpr int R = decltype(r)::value, C = decltype(c)::value;
      vec<T> tile[R][C] = {};
      tile_broadcast<Single<T>>(tile, left.data + row * left.row, left.row, left.inner,
                                right.data + vector * L, right.stride, L, right.rows);
      XATTN_UNROLL
      for (int i = 0; i < R; ++i) {
        XATTN_UNROLL
        for (int j = 0; j < C; ++j) store(out.row(row + i) + (vector + j) * L, tile[i][j] * scale);
      }
    });
  });
}

// out[i] = sum_k v[k] * m(k, i)
template <class T>
void multiply_left(const T* v, const Matrix<T>& m, T* out) {
  for (int64_t i = 0; i < m.columns; ++i) out[i] = 0;
  for (int64_t k = 0; k < m.rows; ++k) {
    for (int64_t i = 0; i < m.columns; ++i) out[i] += v[k] * m.row(k)[i];
  }
}
// out[i] = sum_k m(i, k) * v[k]
template <class T>
void multiply_right(const Matrix<T>& m, const T* v, T* out) {
  for (int64_t i = 0; i < m.rows; ++i) {
    T sum = 0;
    for (int64_t k = 0; k < m.columns; ++k) sum += m.row(i)[k] * v[k];
    out[i] = sum;
  }
}

// m(i, j) += scale * u[i] * v[j]
template <class T>
void add_outer(T scale, const T* u, const T* v, const Matrix<T>& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const T factor = scale * u[i];
    for (int64_t j = 0; j < m.columns; ++j) m.row(i)[j] += factor * v[j];
  }
}
template <class T>
void multiply_by(T scale, T* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] *= scale;
}

template <class T, class S>
void write_matrix(const Matrix<T>& m, S* to) {
  for (int64_t r = 0; r < m.rows; ++r) write_values(m.row(r), m.columns, to + r * m.columns);
}

// One element of a packed weight from the kStep values that it holds.
template <class T>
T pack_element(const T (&v)[1]) {
  return v[0];
}
inline uint32_t pack_element(const float (&v)[2]) {
  uint32_t halves[2];
  for (int i = 0; i < 2; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v[i], sizeof(bits));
    halves[i] = v[i] == v[i] ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
  }
  return halves[0] | halves[1] << 16;
}

// Room for a packed weight; inputs and outputs are rounded up to whole steps.
template <class M>
PackedWeight<M> take_weight(Arena& arena, int64_t inputs, int64_t outputs) {
  const int64_t steps = (inputs + M::kStep - 1) / M::kStep, padded = round_up(outputs, M::kStep);
  auto* data = arena.take<typename M::Elem>(steps * padded);
  return {data, arena.take<typename M::Acc>(padded), steps, padded};
}

// Fills it: value(k, o) is what entry k of the input adds to output o, `bias` may be null. What was
// rounded up becomes zero.
template <class M, class F>
void pack_weight(const PackedWeight<M>& weight, int64_t inputs, int64_t outputs, F value,
                 const typename M::Acc* bias) {
  auto* next = weight.data;
  for_columns<TileShape<M>::kColumns, M::kStep>(weight.outputs, [&](auto c, int64_t first) {
    for (int64_t k = 0; k < weight.steps; ++k) {
      for (int64_t o = first; o < first + decltype(c)::value; ++o) {
        typename M::Acc entry[M::kStep];
        for (int i = 0; i < M::kStep; ++i) {
          const int64_t input = k * M::kStep + i;
          const bool padding = M::kStep > 1 && (input >= inputs || o >= outputs);
          entry[i] = padding ? 0 : value(input, o);
        }
        *next++ = pack_element(entry);
      }
    }
  });
  for (int64_t o = 0; o < weight.outputs; ++o) {
    weight.bias[o] = bias && o < outputs ? bias[o] : 0;
  }
}

// Adds `count` sets of sums, each `bytes` long and one after another, onto the first, in order.
template <class T>
void add_up(T* sums, int64_t bytes, int64_t count) {
  const int64_t values = bytes / sizeof(T);
  for (int64_t i = 1; i < count; ++i) {
    for (int64_t v = 0; v < values; v += Lanes<T>::n) {
      store(sums + v, load(sums + v) + load(sums + i * values + v));
    }
  }
}

}  // namespace xattn::XATTN_ISA
