// What is added to the logits (relative-position bias, the shift's mask) or multiplies the weights
// (dropout), laid out as the softmax tiles read it.
#pragma once

#include "ipsa_unit.h"

namespace xattn::XATTN_ISA {

// Logits that no softmax weight survives, yet finite: 2^(kNever - anything real) is 0, never NaN.
constexpr float kNever = -1e30f;

// Relative-position bias of one head as the softmax reads it: [rows][columns], then the tail
// column; times log2 e; kNever in columns beyond the last key. `bins` is scratch for the head's
// table in reverse order, in which the keys of one window row are neighbours.
template <class U>
void expand_bias(const U& u, int64_t head, typename U::T* bins, typename U::T* dense) {
  using T = typename U::T;
  const IpsaArgs& a = u.args;
  const int64_t columns = u.columns(), n = u.n(), keys = n - u.has_tail();
  const int64_t span_w = 2 * a.window_w - 1, count = a.bias_bins();
  const auto* table = (const typename U::Storage*)a.bias_table;
  for (int64_t i = 0; i < count; ++i) {
    bins[count - 1 - i] = table ? load_1(table + i * a.heads + head) * T(kLog2e) : T(0);
  }
  for (int64_t i = 0; i < u.rows(); ++i) {
    T* row = dense + i * columns;
    T last = 0;
    if (i >= n) {  // queries that only fill the tile
      for (int64_t j = 0; j < columns; ++j) row[j] = 0;
    } else {
      const int64_t iy = i / a.window_w, ix = i % a.window_w;
      for (int64_t jy = 0; jy < a.window_h; ++jy) {
        const int64_t bin = (iy - jy + a.window_h - 1) * span_w + ix + a.window_w - 1;
        const T* from = bins + count - 1 - bin;
        // Whole vectors: what they write too much, the next window row or row overwrites.
        for (int64_t jx = 0; jx < a.window_w; jx += U::L) {
          store(row + jy * a.window_w + jx, load(from + jx));
        }
        last = from[a.window_w - 1];
      }
    }
    for (int64_t j = keys; j < columns; ++j) row[j] = T(kNever);
    dense[u.tail_at() + i] = last;
  }
}

// Adds a dense bias gradient [rows][columns] + tail into the bins of the table, in a fixed order.
template <class U>
void fold_bias_gradient(const U& u, const typename U::T* dense, typename U::T* bins) {
  const IpsaArgs& a = u.args;
  const int64_t columns = u.columns(), keys = u.n() - u.has_tail();
  const int64_t span_w = 2 * a.window_w - 1;
  for (int64_t i = 0; i < u.n(); ++i) {
    const int64_t iy = i / a.window_w, ix = i % a.window_w;
    for (int64_t jy = 0, j = 0; jy < a.window_h; ++jy) {
      auto* out = bins + (iy - jy + a.window_h - 1) * span_w + ix + a.window_w - 1;
      for (int64_t jx = 0; jx < a.window_w; ++jx, ++j) {
        out[-jx] += j < keys ? dense[i * columns + j] : dense[u.tail_at() + i];
      }
    }
  }
}

// The shift's mask for a window on the seam: kNever where exactly one of two tokens wrapped around.
template <class U>
void build_mask(const U& u, int edge, typename U::T* dense) {
  using T = typename U::T;
  const IpsaArgs& a = u.args;
  const int64_t columns = u.columns(), keys = u.n() - u.has_tail();
  const auto region = [&](int64_t t) {
    const bool wrapped_y = (edge & 1) && t / a.window_w >= a.window_h - a.shift_h;
    const bool wrapped_x = (edge & 2) && t % a.window_w >= a.window_w - a.shift_w;
    return wrapped_y * 2 + wrapped_x;
  };
  for (int64_t i = 0; i < u.rows(); ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const bool apart = i < u.n() && j < keys && region(i) != region(j);
      dense[i * columns + j] = apart ? T(kNever) : T(0);
    }
    const bool apart = i < u.n() && region(i) != region(u.n() - 1);
    dense[u.tail_at() + i] = apart ? T(kNever) : T(0);
  }
}

// Dense biases of some heads, and masks of the three kinds of seam, each made when first needed.
template <class U>
struct DenseTerms {
  using T = typename U::T;
  const U& u;
  int64_t head_begin, heads;
  T *bins, *biases, *masks;
  bool* ready;  // [heads], then [3]

  static int64_t bytes(const U& u, int64_t heads) {
    Arena arena(nullptr);
    DenseTerms terms(u, 0, heads, arena);
    return arena.used();
  }
  DenseTerms(const U& u, int64_t head_begin, int64_t heads, Arena& arena)
      : u(u), head_begin(head_begin), heads(heads) {
    bins = arena.take<T>(u.args.bias_bins() + U::L);
    biases = arena.take<T>(heads * u.dense_size());
    masks = arena.take<T>(3 * u.dense_size());
    ready = arena.take<bool>(heads + 3);
  }
  void clear() {
    for (int64_t i = 0; i < heads + 3; ++i) ready[i] = false;
  }
  const T* bias(int64_t head) {
    const int64_t i = head - head_begin;
    T* dense = biases + i * u.dense_size();
    if (!ready[i]) expand_bias(u, head, bins, dense);
    ready[i] = true;
    return dense;
  }
  const T* mask(int edge) {
    if (edge == 0) return nullptr;
    T* dense = masks + (edge - 1) * u.dense_size();
    if (!ready[heads + edge - 1]) build_mask(u, edge, dense);
    ready[heads + edge - 1] = true;
    return dense;
  }
};

// Dropout factors of one unit, [round_up(n, 4)][weight_stride].
template <class U>
void dropout_factors(const U& u, const Dropout& dropout, uint64_t unit, typename U::T* out) {
  constexpr int lanes = Lanes<float>::n;
  vu32 lane;
  for (int l = 0; l < lanes; ++l) lane[l] = l;
  const int64_t stride = u.weight_stride();
  for (int64_t i = 0; i < u.n(); i += 4) {
    for (int64_t j = 0; j < u.n(); j += lanes) {
      keep_weights(dropout, lane + (uint32_t)(i / 4 * u.n() + j), splat((uint32_t)unit),
                   splat((uint32_t)(unit >> 32)), out + i * stride + j, stride);
    }
  }
}

Dropout make_dropout(const IpsaArgs& a) {
  const double scaled = a.dropout_p * 4294967296.0;
  return {{a.dropout_key[0], a.dropout_key[1]},
          scaled >= 4294967295.0 ? 4294967295u : (uint32_t)scaled,
          1.0 / (1.0 - a.dropout_p)};
}

}  // namespace xattn::XATTN_ISA
