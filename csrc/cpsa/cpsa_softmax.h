// The softmax rows of CPSA. A row holds one query's logits, a vector per key: lane by lane another
// channel, so that nothing is ever reduced across lanes.
#pragma once

#include "cpsa_products.h"

namespace xattn::XATTN_ISA {

constexpr double kLog2eDouble = 1.44269504088896340736;

// Score rows are one vector longer than the keys: a stride of 64 vectors would map every row to the
// same cache sets.
inline int64_t score_row(int64_t keys, int lanes) { return (keys + 1) * lanes; }

template <class T>
XATTN_INLINE vec<T> row_maximum(const T* row, int64_t keys) {
  constexpr int L = Lanes<T>::n;
  vec<T> top = load(row), other = top;
  int64_t s = 1;
  for (; s + 2 <= keys; s += 2) {
    top = vmax(top, load(row + s * L));
    other = vmax(other, load(row + (s + 1) * L));
  }
  if (s < keys) top = vmax(top, load(row + s * L));
  return vmax(top, other);
}

// Overwrites logits (in powers of two) by 2^(logit - maximum) and returns one over their sum.
template <class T>
XATTN_INLINE vec<T> exponentiate(T* row, int64_t keys) {
  constexpr int L = Lanes<T>::n;
  const vec<T> top = row_maximum(row, keys);
  vec<T> sum = {}, other = {};
  int64_t s = 0;
  for (; s + 2 <= keys; s += 2) {
    const vec<T> e0 = exp2_nonpositive(load(row + s * L) - top);
    const vec<T> e1 = exp2_nonpositive(load(row + (s + 1) * L) - top);
    store(row + s * L, e0);
    store(row + (s + 1) * L, e1);
    sum += e0;
    other += e1;
  }
  if (s < keys) {
    const vec<T> e0 = exp2_nonpositive(load(row + s * L) - top);
    store(row + s * L, e0);
    sum += e0;
  }
  return splat((T)1) / (sum + other);
}

#if defined(__AVX512BF16__)
// The same into pairs of neighbouring keys: exponentials rounded to bfloat16, an odd last one with
// a partner of zero.
XATTN_INLINE vfloat exponentiate_pairs(const float* row, int64_t keys, uint32_t* pairs) {
  constexpr int L = Lanes<float>::n;
  const vfloat top = row_maximum(row, keys);
  vfloat sum[2] = {};
  for (int64_t s = 0; s < keys; s += 2) {
    vfloat e[2] = {};
    e[0] = exp2_nonpositive_rough(load(row + s * L) - top);
    if (s + 1 < keys) e[1] = exp2_nonpositive_rough(load(row + (s + 1) * L) - top);
    store(pairs + s / 2 * L, to_pair(e[0], e[1]));
    sum[0] += e[0];
    sum[1] += e[1];
  }
  return splat(1.0f) / (sum[0] + sum[1]);
}
#endif

// One row of the backward. In: logits (base e) and the gradient of the weights. On return
// `logits` holds 2^..., not yet normalised; `inverse` is one over their sum and `delta` the sum of
// weight times gradient.
template <class T>
struct RowGradient {
  vec<T> inverse, delta;
};
template <class T>
XATTN_INLINE RowGradient<T> begin_row_gradient(T* logits, const T* grad, int64_t keys) {
  constexpr int L = Lanes<T>::n;
  const vec<T> log2e = splat((T)kLog2eDouble);
  const vec<T> top = row_maximum(logits, keys);
  vec<T> sum[2] = {}, dot[2] = {};
  int64_t s = 0;
  for (; s + 2 <= keys; s += 2) {
    XATTN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const vec<T> e = exp2_nonpositive((load(logits + (s + i) * L) - top) * log2e);
      store(logits + (s + i) * L, e);
      sum[i] += e;
      dot[i] += e * load(grad + (s + i) * L);
    }
  }
  if (s < keys) {
    const vec<T> e = exp2_nonpositive((load(logits + s * L) - top) * log2e);
    store(logits + s * L, e);
    sum[0] += e;
    dot[0] += e * load(grad + s * L);
  }
  const vec<T> inverse = splat((T)1) / (sum[0] + sum[1]);
  return {inverse, (dot[0] + dot[1]) * inverse};
}

// The rows of a forward block, [query][key]: logits in, the factor of the weighted sum out, not yet
// normalised. `inverse` [query] gets one over the sums. Returns the length of a row of `weights`.
template <class M>
int64_t softmax_rows(typename M::Acc* scores, int64_t row, int64_t queries, int64_t keys,
                     int64_t slots, typename M::Elem* weights, typename M::Acc* inverse) {
  constexpr int L = kLanesOf<M>;
  if constexpr (M::kStep == 1) {
    for (int64_t q = 0; q < queries; ++q) {
      store(inverse + q * L, exponentiate(scores + q * row, keys));
    }
    return row;
  } else {
    const int64_t weight_row = score_row(slots / 2, L);
    for (int64_t q = 0; q < queries; ++q) {
      store(inverse + q * L, exponentiate_pairs(scores + q * row, keys, weights + q * weight_row));
    }
    return weight_row;
  }
}

// The softmax W of a block of n queries and its gradient dS as factors: rows 0..n-1 are W, rows
// n..2n-1 dS. With one value a step they overwrite the scores and serve both ways.
template <class M>
struct RowWeights {
  using Elem = typename M::Elem;
  static constexpr int L = kLanesOf<M>;
  Elem* by_key = nullptr;    // [row][key / step]
  Elem* by_query = nullptr;  // [row / step][key]
  int64_t by_key_row = 0, by_query_row = 0;

  RowWeights() = default;
  RowWeights(Arena& arena, typename M::Acc* scores, int64_t rows, int64_t slots)
      : by_key_row(score_row(slots / M::kStep, L)), by_query_row(score_row(slots, L)) {
    if constexpr (M::kStep == 1) {
      by_key = by_query = scores;
    } else {
      by_key = arena.take<Elem>(rows * by_key_row);
      by_query = arena.take<Elem>(rows / 2 * by_query_row);
    }
  }

  // Rows from `first` on, inner dimension keys; or rows are keys, inner dimension all rows.
  Factor<M> over_keys(int64_t first) const { return {by_key + first * by_key_row, by_key_row, L}; }
  Factor<M> over_queries() const { return {by_query, L, by_query_row}; }

  // scores: n rows of dW, then n rows of logits (base e), `keys` of `slots` columns in use.
  void differentiate(typename M::Acc* scores, int64_t row, int64_t n, int64_t keys,
                     int64_t slots) const {
    typename M::Acc* logits = scores + n * row;
    if constexpr (M::kStep == 1) {
      differentiate_rows(scores, logits, row, n, keys);
    } else {
      for (int64_t q = 0; q < n; q += 2) {
        const RowGradient<float> begun[2] = {
            begin_row_gradient(logits + q * row, scores + q * row, keys),
            begin_row_gradient(logits + (q + 1) * row, scores + (q + 1) * row, keys)};
        finish_pair_of_rows(begun, scores + q * row, logits + q * row, row, q, n, keys, slots);
      }
    }
  }

  // The same in place: dW becomes W, the logits become dS.
  template <class T>
  static void differentiate_rows(T* grad, T* logits, int64_t row, int64_t n, int64_t keys) {
    for (int64_t q = 0; q < n; ++q) {
      const RowGradient<T> begun = begin_row_gradient(logits + q * row, grad + q * row, keys);
      finish_row(begun, grad + q * row, logits + q * row, keys);
    }
  }

 private:
  template <class T>
  static void finish_row(const RowGradient<T>& begun, T* grad, T* exponentials, int64_t keys) {
    for (int64_t s = 0; s < keys * L; s += L) {
      const vec<T> weight = load(exponentials + s) * begun.inverse;
      store(exponentials + s, weight * (load(grad + s) - begun.delta));
      store(grad + s, weight);
    }
  }

  // Two rows at once: pairs of keys for one order, pairs of queries for the other.
  template <class T>
  void finish_pair_of_rows(const RowGradient<T> (&begun)[2], const T* grad, const T* exponentials,
                           int64_t row, int64_t q, int64_t n, int64_t keys, int64_t slots) const {
    for (int64_t s = 0; s < slots; s += 2) {
      vec<T> weight[2][2] = {}, score[2][2] = {};  // [query][key]
      XATTN_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (s + k >= keys) break;  // the partner of an odd last key stays zero
        XATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int64_t at = i * row + (s + k) * L;
          weight[i][k] = load(exponentials + at) * begun[i].inverse;
          score[i][k] = weight[i][k] * (load(grad + at) - begun[i].delta);
        }
      }
      XATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        store(by_key + (q + i) * by_key_row + s / 2 * L, to_pair(weight[i][0], weight[i][1]));
        store(by_key + (n + q + i) * by_key_row + s / 2 * L, to_pair(score[i][0], score[i][1]));
        store(by_query + q / 2 * by_query_row + (s + i) * L, to_pair(weight[0][i], weight[1][i]));
        store(by_query + (n + q) / 2 * by_query_row + (s + i) * L,
              to_pair(score[0][i], score[1][i]));
      }
    }
  }
};

}  // namespace xattn::XATTN_ISA
