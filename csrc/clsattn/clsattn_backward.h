// Backward of CLS cross attention: the weights and the norm's moments are those of the forward.
//
// With z_h = sum_t w_t t (w after dropout), dz_h = W_v,h^T grad_out_h, and m the dropout factors:
//   dw_t = m_t (g dz_h . t + c_h),  c_h = dz_h . s + grad_out_h . b_v,  0 unless there is dropout:
//   the softmax does not see what is the same for all tokens;
//   ds_t = w_t (dw_t - sum w dw),  du_h = g sum ds_t t,  dt = g sum_h (w_t m_t dz_h + ds_t u_h).
#pragma once

#include "clsattn_call.h"

namespace xattn::XATTN_ISA::clsattn {

constexpr int64_t kChunk = 64;  // channels of W_q that are taken together

template <class S>
struct Backward {
  using C = Call<S>;
  using T = typename C::T;
  using V = typename C::V;
  static constexpr int L = C::L;
  enum { kDelta, kKept };  // of a part: sum w dw, and sum w m

  const C& c;
  T* rows;    // [2][heads][stride]: g dz, g u
  T* hat;     // [block][stride]
  T* grads;   // [block][stride]
  T* coeffs;  // [2][heads][row]: w m, ds
  T *factors, *constants;
  int64_t bytes;

  Backward(const C& c, void* memory) : c(c) {
    Arena arena(memory);
    rows = arena.take<T>(2 * c.heads * c.stride);
    hat = arena.take<T>(c.block * c.stride);
    grads = arena.take<T>(c.block * c.stride);
    coeffs = arena.take<T>(2 * c.heads * c.row);
    factors = arena.take<T>(c.row);
    constants = arena.take<T>(c.heads);
    bytes = arena.used();
  }

  void token(int64_t b) const {
    c.template gather<true>(b, 0, 1, hat);
    const S* grad = (const S*)c.args.grad_out + b * c.args.grad_out_stride;
    for (int64_t z = 0; z < c.vectors; ++z) {
      const int64_t at = b * c.stride + z * L;
      const V v = load(hat + z * L);
      store(c.cls_hat + at, v);
      store(c.cls + at, v * c.norm_weight(z) + c.norm_shift(z));
      store(c.grad_out + at, load_n(grad + z * L, c.left(z)));
    }
  }

  // dz of one head of all images.
  void pooled(int64_t h) const {
    const Factors<T> grad{c.grad_out + h * c.dim, c.stride, 1};
    multiply(Into<T>::scratch(c.of_head(c.grad_pooled, 0, h), c.heads * c.stride), grad, c.batch,
             c.dim, c.head_weight(c.args.v_weight, h), c.channels);
  }

  // dw of a part of the tokens of an image, and its share of sum w dw.
  void weights(int64_t unit) const {
    const int64_t b = unit / c.parts, part = unit % c.parts, end = c.part_begin(part + 1);
    for (int64_t h = 0; h < c.heads; ++h) {
      scale_row(c.of_head(c.grad_pooled, b, h), rows + h * c.stride);
      constants[h] = c.dropout() ? constant(b, h) : T(0);
      c.stats(unit, h)[kDelta] = c.stats(unit, h)[kKept] = 0;
    }
    for (int64_t first = c.part_begin(part); first < end; first += c.block) {
      const int64_t count = min_of(c.block, end - first);
      c.template gather<true>(b, first, count, hat);
      dot_products(Matrix<T>{rows, c.stride}, c.heads, Matrix<T>{hat, c.stride}, count,
                   c.vectors * L,
                   [&](int64_t h, int64_t t, int64_t size, const T* values) XATTN_LAMBDA_INLINE {
                     for (int64_t i = 0; i < size; ++i) coeffs[h * c.row + t + i] = values[i];
                   });
      for (int64_t h = 0; h < c.heads; ++h) weigh(unit, b, h, first, count);
    }
    if (c.parts == 1) patches(unit);
  }

  // The gradients of a part of the tokens, and its share of du / g.
  void patches(int64_t unit) const {
    const int64_t b = unit / c.parts, part = unit % c.parts, end = c.part_begin(part + 1);
    T *keys = c.of_head(c.part_sums, unit, 0), *second = rows + c.heads * c.stride;
    for (int64_t h = 0; h < c.heads; ++h) {
      constants[h] = total(b, h, kDelta);
      scale_row(c.of_head(c.grad_pooled, b, h), rows + h * c.stride);
      for (int64_t z = 0; z < c.vectors; ++z) {
        store(second + h * c.stride + z * L, c.get(c.key(b, h), z) * c.norm_weight(z));
        store(keys + h * c.stride + z * L, V{});
      }
    }
    for (int64_t first = c.part_begin(part); first < end; first += c.block) {
      const int64_t count = min_of(c.block, end - first);
      c.template gather<true>(b, first, count, hat);
      for (int64_t h = 0; h < c.heads; ++h) set_coefficients(b, h, first, count);
      add_block(b, first, count, keys);
    }
  }

  // du and z of every head of an image, of all parts.
  void join(int64_t b) const {
    for (int64_t h = 0; h < c.heads; ++h) {
      const T share = c.dropout() ? total(b, h, kKept) : T(1);
      c.kept[b * c.heads + h] = share;
      T* first = c.of_head(c.part_sums, b * c.parts, h);  // of the first part: takes the others'
      for (int64_t z = 0; z < c.vectors; ++z) {
        V sum = load(first + z * L);
        for (int64_t p = 1; p < c.parts; ++p) {
          sum += load(c.of_head(c.part_sums, b * c.parts + p, h) + z * L);
        }
        store(first + z * L, sum);
        const V g = c.norm_weight(z);
        store(c.of_head(c.grad_keys, b, h) + z * L, sum * g);
        const V pooled = c.get(c.pooled_hat(b, h), z) * g + c.norm_shift(z) * share;
        store(c.of_head(c.pooled, b, h) + z * L, pooled);
      }
    }
  }

  // dq, and the gradients of W_k, W_v and the biases of one head: sums over the images.
  void head(int64_t h) const {
    const int64_t at = h * c.stride, row = c.heads * c.stride, weight = h * c.dim * c.channels;
    const T scale = (T)c.args.scale;
    dot_products(Matrix<T>{c.grad_keys + at, row}, c.batch, c.head_weight(c.args.k_weight, h),
                 c.dim, c.channels, [&](int64_t b, int64_t j, int64_t count, const T* values) {
                   T* to = c.grad_q + b * c.stride + h * c.dim + j;
                   for (int64_t i = 0; i < count; ++i) to[i] = values[i] * scale;
                 });
    S* grad_k = (S*)c.args.grad_k_weight + weight;
    multiply(Into<S>::rows(grad_k, c.channels, c.args.scale),
             Factors<T>{c.query(0, h), 1, c.heads * c.head_row()}, c.dim, c.batch,
             Matrix<T>{c.grad_keys + at, row}, c.channels);
    S* grad_v = (S*)c.args.grad_v_weight + weight;
    multiply(Into<S>::rows(grad_v, c.channels), Factors<T>{c.grad_out + h * c.dim, 1, c.stride},
             c.dim, c.batch, Matrix<T>{c.pooled + at, row}, c.channels);
    biases(h);
  }

  // The gradient of `kChunk` rows of W_q, and of as many channels of CLS by way of the query.
  void query(int64_t chunk) const {
    const int64_t first = chunk * kChunk, count = min_of(kChunk, c.channels - first);
    S* grad = (S*)c.args.grad_q_weight + first * c.channels;
    multiply(Into<S>::rows(grad, c.channels), Factors<T>{c.grad_q + first, 1, c.stride}, count,
             c.batch, Matrix<T>{c.cls, c.stride}, c.channels);
    const Matrix<S> weight{(const S*)c.args.q_weight + first, c.channels};
    multiply(Into<T>::scratch(c.by_query + first, c.stride), Factors<T>{c.grad_q, c.stride, 1},
             c.batch, c.channels, weight, count);
  }

  // Items [0, batch): the gradient of CLS; beyond: a vector of those of the norm.
  void norm(int64_t item) const {
    if (item >= c.batch) return norm_vector(item - c.batch);
    T* grad = c.grad_cls + item * c.stride;
    for (int64_t z = 0; z < c.vectors; ++z) {
      const V v = load(c.by_query + item * c.stride + z * L) * c.norm_weight(z);
      store(grad + z * L, load(grad + z * L) + v);
    }
    const T* inverse = c.norm() ? c.token_state(item, c.heads + 1) : nullptr;
    c.before_norm(grad, c.cls_hat + item * c.stride, inverse, 1,
                  [&](int64_t) { return (S*)c.args.grad_cls + item * c.channels; });
  }

 private:
  void scale_row(const T* from, T* to) const {
    for (int64_t z = 0; z < c.vectors; ++z) {
      store(to + z * L, load(from + z * L) * c.norm_weight(z));
    }
  }

  T total(int64_t b, int64_t h, int which) const {
    T sum = 0;
    for (int64_t p = 0; p < c.parts; ++p) sum += c.stats(b * c.parts + p, h)[which];
    return sum;
  }

  // c_h: what dropout alone does not cancel.
  T constant(int64_t b, int64_t h) const {
    const T *grad = c.grad_out + b * c.stride + h * c.dim, *dz = c.of_head(c.grad_pooled, b, h);
    V acc{};
    for (int64_t z = 0; z < c.vectors; ++z) acc += load(dz + z * L) * c.norm_shift(z);
    T sum = sum_lanes(acc);
    const S* bias = (const S*)c.args.v_bias;
    for (int64_t d = 0; bias && d < c.dim; ++d) sum += grad[d] * load_1(bias + h * c.dim + d);
    return sum;
  }

  // dw of one head's block, from the products g dz . t.
  void weigh(int64_t unit, int64_t b, int64_t h, int64_t first, int64_t count) const {
    if (c.dropout()) c.dropout_factors(b, h, first, count, factors);
    const T *w = c.token_state(b, h) + first, *products = coeffs + h * c.row;
    T* out = c.grad_weights + (b * c.heads + h) * c.tokens + first;
    V delta{}, kept{};
    for (int64_t t = 0; t < count; t += L) {
      const int64_t left = count - t;
      V grad = load_n(products + t, left);
      if (c.dropout()) {
        const V factor = load_n(factors + t, left);
        grad = (grad + constants[h]) * factor;
        kept += load_n(w + t, left) * factor;
      }
      delta += load_n(w + t, left) * grad;
      store_n(out + t, grad, left);
    }
    T* stats = c.stats(unit, h);
    stats[kDelta] += sum_lanes(delta);
    stats[kKept] += sum_lanes(kept);
  }

  void set_coefficients(int64_t b, int64_t h, int64_t first, int64_t count) const {
    if (c.dropout()) c.dropout_factors(b, h, first, count, factors);
    const T* w = c.token_state(b, h) + first;
    const T* grad = c.grad_weights + (b * c.heads + h) * c.tokens + first;
    T *kept = coeffs + h * c.row, *logits = kept + c.heads * c.row;
    for (int64_t t = 0; t < count; t += L) {
      const V weight = load_n(w + t, count - t);
      store(logits + t, weight * (load_n(grad + t, count - t) - constants[h]));
      store(kept + t, c.dropout() ? weight * load_n(factors + t, count - t) : weight);
    }
  }

  void add_block(int64_t b, int64_t first, int64_t count, T* keys) const {
    const int64_t width = c.vectors * L;
    multiply(Into<T>::sums(keys, c.stride), Factors<T>{coeffs + c.heads * c.row, c.row, 1}, c.heads,
             count, Matrix<T>{hat, c.stride}, width);
    multiply(Into<T>::scratch(grads, c.stride), Factors<T>{coeffs, 1, c.row}, count, 2 * c.heads,
             Matrix<T>{rows, c.stride}, width);
    int64_t skip = 0;
    if (first == 0) {  // CLS waits for what comes by way of the query
      skip = 1;
      for (int64_t z = 0; z < c.vectors; ++z) {
        store(c.grad_cls + b * c.stride + z * L, load(grads + z * L));
      }
    }
    const T* inverse = c.norm() ? c.token_state(b, c.heads + 1) + first + skip : nullptr;
    const int64_t at = skip * c.stride;
    c.before_norm(grads + at, hat + at, inverse, count - skip,
                  [&](int64_t t) XATTN_LAMBDA_INLINE { return c.grad_patch(b, first + skip + t); });
  }

  void biases(int64_t h) const {
    for (int64_t d = h * c.dim; d < (h + 1) * c.dim; ++d) {
      T q = 0, v = 0;
      for (int64_t b = 0; b < c.batch; ++b) {
        q += c.grad_q[b * c.stride + d];
        v += c.grad_out[b * c.stride + d] * c.kept[b * c.heads + h];
      }
      if (c.args.grad_q_bias) store_1((S*)c.args.grad_q_bias + d, q);
      if (c.args.grad_v_bias) store_1((S*)c.args.grad_v_bias + d, v);
    }
  }

  // Sums over tokens and images of (gradient after the norm) t and of that gradient alone, by way
  // of what each head summed; sum_t ds_t is zero.
  void norm_vector(int64_t z) const {
    V weight{}, shift{};
    for (int64_t b = 0; b < c.batch; ++b) {
      const V extra = load(c.by_query + b * c.stride + z * L);
      V sum = extra * load(c.cls_hat + b * c.stride + z * L), plain = extra;
      for (int64_t h = 0; h < c.heads; ++h) {
        const V dz = load(c.of_head(c.grad_pooled, b, h) + z * L);
        sum += dz * c.get(c.pooled_hat(b, h), z);
        sum += c.get(c.key(b, h), z) * load(c.of_head(c.part_sums, b * c.parts, h) + z * L);
        plain += dz * c.kept[b * c.heads + h];
      }
      weight += sum;
      shift += plain;
    }
    c.put((S*)c.args.grad_norm_weight, z, weight);
    if (c.args.grad_norm_bias) c.put((S*)c.args.grad_norm_bias, z, shift);
  }
};

}  // namespace xattn::XATTN_ISA::clsattn
