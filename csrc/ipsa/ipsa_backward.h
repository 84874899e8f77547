// Backward of inner-patch attention over a chunk of windows and heads.
//
// With P the softmax weights, m the dropout factors and dO the output's gradient:
//   g = (dO V^T) m,   dS = P (g - rowsum(P g)),   dV = (P m)^T dO,
//   dQ = scale dS K,  dK = scale dS^T Q,          dbias = sum of dS over windows.
// P is recomputed; nothing but qkv was saved.
#pragma once

#include "ipsa_bias.h"

namespace xattn::XATTN_ISA {

template <class U>
struct Backward {
  using S = typename U::Storage;
  using T = typename U::T;
  using V = typename U::V;
  using Elem = typename U::Elem;
  using Weight = typename U::Weight;
  static constexpr int L = U::L;

  const U& u;
  Window windows[2];
  S* zeros;
  // "rows" are broadcast by a tile, "values" are its vectors; they differ in packed pairs alone.
  Elem *q_rows, *grad_rows, *k_transposed, *v_transposed;
  Elem *q_values, *k_values, *grad_values;
  T *spill, *exponentials, *inverse, *tail_logit, *tail_grad, *dropout;
  Weight *p, *ds;            // [rows][weight_stride]: P m and dS of the unit
  Elem *p_steps, *ds_steps;  // the same, pairs of rows packed: [steps_n][weight_stride]
  T* bias_gradient;          // [chunk heads][dense_size]
  T* pad_gradient;           // [3][width_d]: of the unit, so that long sums have short parts
  char* dense_memory;

  static int64_t scratch(const IpsaArgs& a, int64_t chunk_heads) {
    Arena arena(nullptr);
    const U u{a};
    Backward b(u, arena, chunk_heads);
    return arena.used();
  }

  Backward(const U& u, Arena& arena, int64_t heads) : u(u) {
    const IpsaArgs& a = u.args;
    const int64_t row_elems = u.rows() * u.stride_d(), values = u.steps_n() * u.width_d();
    const int64_t weights = u.rows() * u.weight_stride();
    for (Window& w : windows) w = new_window(a, arena);
    zeros = arena.take<S>(max_of(2 * u.width_d(), u.weight_stride() + L));
    q_rows = arena.take<Elem>(row_elems);
    grad_rows = arena.take<Elem>(row_elems);
    k_transposed = arena.take<Elem>(u.stride_d() * u.columns());
    v_transposed = arena.take<Elem>(u.stride_d() * u.columns());
    k_values = arena.take<Elem>(values);
    q_values = U::kPairs ? arena.take<Elem>(values) : q_rows;
    grad_values = U::kPairs ? arena.take<Elem>(values) : grad_rows;
    spill = arena.take<T>(U::kTileRows * u.columns());
    exponentials = arena.take<T>(U::kTileRows * u.weight_stride());
    inverse = arena.take<T>(U::kPerRow);
    tail_logit = arena.take<T>(round_up(u.rows(), L) + L);
    tail_grad = arena.take<T>(round_up(u.rows(), L) + L);
    dropout = arena.take<T>(a.dropout_p > 0 ? round_up(u.rows(), 4) * u.weight_stride() + L : 0);
    p = arena.take<Weight>(weights);
    ds = arena.take<Weight>(weights);
    p_steps = U::kPairs ? arena.take<Elem>(u.steps_n() * u.weight_stride()) : (Elem*)p;
    ds_steps = U::kPairs ? arena.take<Elem>(u.steps_n() * u.weight_stride()) : (Elem*)ds;
    bias_gradient = arena.take<T>(a.bias_table ? heads * u.dense_size() : 0);
    pad_gradient = arena.take<T>(3 * u.width_d());
    dense_memory = arena.take<char>(DenseTerms<U>::bytes(u, heads));
  }

  TokenRows<S> part(const Window& w, int64_t head, int which) const {
    return qkv_rows<U>(u.args, w, head, which, zeros);
  }

  // P m and dS of the tile of queries at i0, from its exponentials and dO V^T.
  template <int R>
  XATTN_MEMBER void score_gradients(int64_t i0, T* bias_grad) const {
    const int64_t columns = u.columns(), stride = u.weight_stride();
    const T* factors = u.args.dropout_p > 0 ? dropout + i0 * stride : nullptr;
    alignas(64) T delta[U::kPerRow], tail_p[U::kPerRow], tail_g[U::kPerRow];
    if (u.has_tail()) {
      for (int r = 0; r < R; ++r) {
        tail_p[r] = exponentials[r * stride + columns] * inverse[r];
        tail_g[r] = tail_grad[i0 + r] * (factors ? factors[r * stride + columns] : T(1));
      }
    }
    // grad(r, c): vector c of row r of g.
    const auto finish = [&](auto vectors, auto grad) XATTN_LAMBDA_INLINE {
      V sums[R];
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        sums[r] = V{};
        XATTN_UNROLL
        for (int64_t c = 0; c < vectors; ++c) {
          sums[r] += load(exponentials + r * stride + c * L) * grad(r, c);
        }
        sums[r] *= inverse[r];
      }
      fold_each<Add>(sums, delta);
      if (u.has_tail()) {
        for (int r = 0; r < R; ++r) delta[r] += tail_p[r] * tail_g[r];
      }
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t row = (i0 + r) * stride;
        XATTN_UNROLL
        for (int64_t c = 0; c < vectors; ++c) {
          V weight = load(exponentials + r * stride + c * L) * inverse[r];
          const V d = weight * (grad(r, c) - delta[r]);
          if (factors) weight *= load(factors + r * stride + c * L);
          store(p + row + c * L, weight);
          store(ds + row + c * L, d);
          if (bias_grad) {
            T* sum = bias_grad + (i0 + r) * columns + c * L;
            store(sum, load(sum) + d);
          }
        }
      }
    };
    const auto grad_tile = [&](auto& acc, int64_t first) XATTN_LAMBDA_INLINE {
      tile_broadcast<typename U::Multiply>(acc, grad_rows + i0 * u.stride_d(), u.stride_d(), 1,
                                           v_transposed + first * L, columns, L, u.steps_d());
      if (!factors) return;
      constexpr int C = sizeof(acc[0]) / sizeof(V);
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        XATTN_UNROLL
        for (int c = 0; c < C; ++c) acc[r][c] *= load(factors + r * stride + (first + c) * L);
      }
    };
    if constexpr (U::kColumnsKnown > 0 && U::kColumnsKnown <= columns_beside(R)) {
      V acc[R][U::kColumnsKnown] = {};
      grad_tile(acc, 0);
      finish(U::kColumnsKnown, [&](int r, int64_t c) XATTN_LAMBDA_INLINE { return acc[r][c]; });
    } else {
      for_columns<columns_beside(R), 1>(
          columns / L, [&](auto group, int64_t first) XATTN_LAMBDA_INLINE {
            constexpr int C = decltype(group)::value;
            V acc[R][C] = {};
            grad_tile(acc, first);
            XATTN_UNROLL
            for (int r = 0; r < R; ++r) {
              XATTN_UNROLL
              for (int c = 0; c < C; ++c) store(spill + r * columns + (first + c) * L, acc[r][c]);
            }
          });
      finish(columns / L, [&](int r, int64_t c)
                              XATTN_LAMBDA_INLINE { return load(spill + r * columns + c * L); });
    }
    for (int r = 0; r < R; ++r) {
      const int64_t row = (i0 + r) * stride;
      if (u.has_tail()) {
        const T d = tail_p[r] * (tail_g[r] - delta[r]);
        store_1(p + row + columns, tail_p[r] * (factors ? factors[r * stride + columns] : T(1)));
        store_1(ds + row + columns, d);
        if (bias_grad) bias_grad[u.tail_at() + i0 + r] += d;
      }
      if (U::kPairs && u.n() % 2 == 1) p[row + u.n()] = ds[row + u.n()] = Weight{};
    }
  }

  // Pairs of consecutive queries in one element: the inner dimension of dK and dV.
  void pack_steps(const Weight* rows, Elem* steps) const {
    if constexpr (U::kPairs) {
      const int64_t stride = u.weight_stride();
      for (int64_t s = 0; s < u.steps_n(); ++s) {
        const Weight* low = rows + 2 * s * stride;
        const Weight* high = 2 * s + 1 < u.n() ? low + stride : (const Weight*)zeros;
        for (int64_t j = 0; j < u.n(); j += L)
          store(steps + s * stride + j, to_pair(low + j, high + j));
      }
    }
  }

  XATTN_MEMBER void prefetch_gradient(const Window& w, int64_t head, int which, int64_t i0,
                                      int64_t rows) const {
    const IpsaArgs& a = u.args;
    u.prefetch_written((const S*)a.grad_qkv + (which * a.heads + head) * u.d(), w.pixel,
                       3 * a.channels(), i0, i0 + rows);
  }

  // Writes rows of dQ, dK or dV; a token outside the image adds to the padding's gradient.
  XATTN_MEMBER auto gradient_writer(const Window& w, int64_t head, int which, int64_t i0) const {
    const IpsaArgs& a = u.args;
    const int64_t at = (which * a.heads + head) * u.d();
    return [=](int r, int64_t c, V value) XATTN_LAMBDA_INLINE {
      const int64_t t = i0 + r;
      if (t >= u.n()) return;
      if (w.pixel[t] >= 0) {
        u.store_channels((S*)u.args.grad_qkv + w.pixel[t] * 3 * u.args.channels() + at, c, value);
      } else if (u.args.pad_qkv) {
        T* sum = pad_gradient + which * u.width_d() + c;
        store(sum, load(sum) + value);
      }
    };
  }

  void run(const Window& w, int64_t head, const T* bias, const T* mask, T* bias_grad, T* grad_pad,
           const Window& next, int64_t next_head) const {
    const IpsaArgs& a = u.args;
    const auto q = part(w, head, 0), k = part(w, head, 1), v = part(w, head, 2);
    const TokenRows<S> grad{(const S*)a.grad_out + head * u.d(), w.grad_out, zeros};
    u.gather_rows(q, q_rows);
    u.gather_rows(grad, grad_rows);
    u.gather_transposed(k, k_transposed);
    u.gather_transposed(v, v_transposed);
    u.gather_values(k, k_values);
    if (U::kPairs) {
      u.gather_values(q, q_values);
      u.gather_values(grad, grad_values);
    }
    if (u.has_tail()) {
      u.tail_products(q_rows, k.row(u.n() - 1), tail_logit);
      u.tail_products(grad_rows, v.row(u.n() - 1), tail_grad);
    }
    const typename U::Logits logits{T(a.scale * kLog2e), bias, mask, k_transposed, tail_logit};
    u.for_tiles([&](auto rows, int64_t i0) XATTN_LAMBDA_INLINE {
      constexpr int R = decltype(rows)::value;
      constexpr int kFirst = kFewMisses ? U::kTileRows / 2 : U::kTileRows;
      if (next_head >= 0) prefetch_rows(next, next_head, i0, i0 + kFirst);
      u.template softmax_tile<R>(logits, q_rows, i0, spill, exponentials, inverse);
      if (kFewMisses && next_head >= 0) {
        prefetch_rows(next, next_head, i0 + kFirst, i0 + U::kTileRows);
      }
      prefetch_gradient(w, head, 0, i0, R);
      score_gradients<R>(i0, bias_grad);
    });
    for (int64_t i = 0; i < 3 * u.width_d(); ++i) pad_gradient[i] = 0;
    pack_steps(p, p_steps);
    pack_steps(ds, ds_steps);
    const int64_t stride = u.weight_stride();
    const auto scale = [&](int) { return T(a.scale); };
    const auto one = [&](int) { return T(1); };
    u.for_tiles([&](auto rows, int64_t i0) XATTN_LAMBDA_INLINE {
      prefetch_gradient(w, head, 1, i0, decltype(rows)::value);
      u.template weighted_sum<decltype(rows)::value>((const Elem*)(ds + i0 * stride),
                                                     stride / U::kStep, 1, k_values, scale,
                                                     gradient_writer(w, head, 0, i0));
    });
    u.for_tiles([&](auto rows, int64_t i0) XATTN_LAMBDA_INLINE {
      prefetch_gradient(w, head, 2, i0, decltype(rows)::value);
      u.template weighted_sum<decltype(rows)::value>(ds_steps + i0, 1, stride, q_values, scale,
                                                     gradient_writer(w, head, 1, i0));
    });
    u.for_tiles([&](auto rows, int64_t i0) XATTN_LAMBDA_INLINE {
      u.template weighted_sum<decltype(rows)::value>(p_steps + i0, 1, stride, grad_values, one,
                                                     gradient_writer(w, head, 2, i0));
    });
    if (grad_pad) {
      for (int64_t i = 0; i < 3 * u.d(); ++i) {
        const int64_t part = i / u.d(), c = i % u.d();
        grad_pad[(part * a.heads + head) * u.d() + c] += pad_gradient[part * u.width_d() + c];
      }
    }
  }

  // The next unit's rows of qkv and dO, while this one computes.
  XATTN_MEMBER void prefetch_rows(const Window& w, int64_t head, int64_t from, int64_t to) const {
    const IpsaArgs& a = u.args;
    const int64_t part = a.channels() * (int64_t)sizeof(S), bytes = u.d() * (int64_t)sizeof(S);
    for (int64_t t = from; t < to && t < u.n(); ++t) {
      if (w.qkv[t] < 0) continue;
      const char* row = (const char*)((const S*)a.qkv + head * u.d() + w.qkv[t]);
      const char* grad = (const char*)((const S*)a.grad_out + head * u.d() + w.grad_out[t]);
      for (int64_t at = 0; at < bytes; at += 64) {
        prefetch_line_l2(row + at);
        prefetch_line_l2(row + at + part);
        prefetch_line_l2(row + at + 2 * part);
        prefetch_line_l2(grad + at);
      }
    }
  }
};

template <class U>
void backward_chunk(const IpsaArgs& a, const IpsaChunk& chunk, void* scratch) {
  using T = typename U::T;
  using S = typename U::Storage;
  const U u{a};
  Arena arena(scratch);
  const int64_t heads = chunk.head_end - chunk.head_begin;
  Backward<U> b(u, arena, heads);
  for (S* z = b.zeros; (char*)z < (char*)b.q_rows; ++z) *z = S{};
  if (chunk.grad_bias_bins) {
    for (int64_t i = 0; i < heads * u.dense_size(); ++i) b.bias_gradient[i] = 0;
  }
  Arena dense(b.dense_memory);
  DenseTerms<U> terms(u, chunk.head_begin, heads, dense);
  terms.clear();
  const Dropout dropout = make_dropout(a);
  int current = 0;
  if (chunk.window_begin < chunk.window_end) locate(a, chunk.window_begin, true, b.windows[0]);
  for (int64_t window = chunk.window_begin; window < chunk.window_end; ++window, current ^= 1) {
    const bool last = window + 1 == chunk.window_end;
    const Window &w = b.windows[current], &following = b.windows[current ^ 1];
    if (!last) locate(a, window + 1, true, b.windows[current ^ 1]);
    for (int64_t head = chunk.head_begin; head < chunk.head_end; ++head) {
      const bool same = head + 1 < chunk.head_end;
      const int64_t next_head = same ? head + 1 : last ? -1 : chunk.head_begin;
      T* bias_grad = chunk.grad_bias_bins
                         ? b.bias_gradient + (head - chunk.head_begin) * u.dense_size()
                         : nullptr;
      if (a.dropout_p > 0) {
        dropout_factors(u, dropout, (uint64_t)(window * a.heads + head), b.dropout);
      }
      b.run(w, head, terms.bias(head), terms.mask(w.edge), bias_grad, (T*)chunk.grad_pad,
            same ? w : following, next_head);
    }
  }
  if (chunk.grad_bias_bins) {
    for (int64_t h = 0; h < heads; ++h) {
      fold_bias_gradient(u, b.bias_gradient + h * u.dense_size(),
                         (T*)chunk.grad_bias_bins + (chunk.head_begin + h) * a.bias_bins());
    }
  }
}

}  // namespace xattn::XATTN_ISA
