// Forward of CLS cross attention.
//
// softmax(scale q_h k^T) v = softmax(u_h t^T) t W_v^T with u_h = scale q_h W_k,h: k and v are never
// formed. Of n(x) = g t + s, the norm's shift s adds the same to all logits of a head, so only
// g u_h meets the tokens t, and it joins the weighted sum at the end.
#pragma once

#include "clsattn_call.h"

namespace xattn::XATTN_ISA::clsattn {

template <class S>
struct Forward {
  using C = Call<S>;
  using T = typename C::T;
  using V = typename C::V;
  static constexpr int L = C::L;
  static constexpr T kLowest = sizeof(T) == 4 ? (T)-3e38 : (T)-1e308;
  enum { kTop, kSum, kKept };  // of a part: largest logit, sums of the weights and of those kept

  const C& c;
  T* keys;    // [heads][stride]: g u log2 e
  T* hat;     // [block][stride]
  T* logits;  // [heads][row]: in powers of two, then weights
  T* factors;
  int64_t bytes;

  Forward(const C& c, void* memory) : c(c) {
    Arena arena(memory);
    keys = arena.take<T>(c.heads * c.stride);
    hat = arena.take<T>(c.block * c.stride);
    logits = arena.take<T>(c.heads * c.row);
    factors = arena.take<T>(c.row);
    bytes = arena.used();
  }

  // CLS through the norm.
  void token(int64_t b) const {
    c.template gather<false>(b, 0, 1, hat);
    T* to = c.cls + b * c.stride;
    for (int64_t z = 0; z < c.vectors; ++z) {
      store(to + z * L, load(hat + z * L) * c.norm_weight(z) + c.norm_shift(z));
    }
  }

  // q and u of one head of all images.
  void query(int64_t h) const {
    const S* bias = (const S*)c.args.q_bias;
    const Matrix<S> w = c.head_weight(c.args.q_weight, h);
    dot_products(Matrix<T>{c.cls, c.stride}, c.batch, w, c.dim, c.channels,
                 [&](int64_t b, int64_t j, int64_t count, const T* values) {
                   for (int64_t i = 0; i < count; ++i) {
                     const T add = bias ? load_1(bias + h * c.dim + j + i) : T(0);
                     c.query(b, h)[j + i] = values[i] + add;
                   }
                 });
    const int64_t row = c.heads * c.head_row();
    multiply(Into<T>::rows(c.key(0, h), row, c.args.scale), Factors<T>{c.query(0, h), row, 1},
             c.batch, c.dim, c.head_weight(c.args.k_weight, h), c.channels);
  }

  // Softmax and weighted sum of a part of the tokens of an image, in one pass: where a block raises
  // the largest logit, what was summed before is scaled down. Logits stay in token_state.
  void pool(int64_t unit) const {
    const int64_t b = unit / c.parts, part = unit % c.parts;
    for (int64_t h = 0; h < c.heads; ++h) {
      T *stats = c.stats(unit, h), *sums = c.of_head(c.part_sums, unit, h);
      stats[kTop] = kLowest;
      stats[kSum] = stats[kKept] = 0;
      for (int64_t z = 0; z < c.vectors; ++z) {
        store(sums + z * L, V{});
        const V key = c.get(c.key(b, h), z) * c.norm_weight(z) * (T)kLog2e;
        store(keys + h * c.stride + z * L, key);
      }
    }
    const int64_t end = c.part_begin(part + 1);
    for (int64_t first = c.part_begin(part); first < end; first += c.block) {
      add_block(unit, b, first, min_of(c.block, end - first));
    }
    if (c.parts == 1) join(b);
  }

  // The parts of an image as one softmax.
  void join(int64_t b) const {
    for (int64_t h = 0; h < c.heads; ++h) {
      T top = kLowest, sum = 0, kept = 0;
      for (int64_t p = 0; p < c.parts; ++p) {
        const T other = c.stats(b * c.parts + p, h)[kTop];
        top = other > top ? other : top;
      }
      for (int64_t p = 0; p < c.parts; ++p) {
        const T* stats = c.stats(b * c.parts + p, h);
        sum += stats[kSum] * power(stats[kTop] - top);
        kept += stats[kKept] * power(stats[kTop] - top);
      }
      const T inverse = 1 / sum, share = c.dropout() ? kept * inverse : T(1);
      c.kept[b * c.heads + h] = share;
      write_sums(b, h, top, inverse, share);
      write_weights(c.token_state(b, h), top, inverse);
    }
  }

  // W_v of one head of all images.
  void output(int64_t h) const {
    const S* bias = (const S*)c.args.v_bias;
    dot_products(Matrix<T>{c.pooled + h * c.stride, c.heads * c.stride}, c.batch,
                 c.head_weight(c.args.v_weight, h), c.dim, c.channels,
                 [&](int64_t b, int64_t j, int64_t count, const T* values) {
                   S* out = (S*)c.args.out + b * c.channels + h * c.dim + j;
                   for (int64_t i = 0; i < count; ++i) {
                     const T add = bias ? load_1(bias + h * c.dim + j + i) : T(0);
                     store_1(out + i, values[i] + add * c.kept[b * c.heads + h]);
                   }
                 });
  }

 private:
  static T power(T x) { return exp2_nonpositive(splat(x))[0]; }

  void add_block(int64_t unit, int64_t b, int64_t first, int64_t count) const {
    c.template gather<false>(b, first, count, hat);
    dot_products(Matrix<T>{keys, c.stride}, c.heads, Matrix<T>{hat, c.stride}, count, c.vectors * L,
                 [&](int64_t h, int64_t t, int64_t size, const T* values) XATTN_LAMBDA_INLINE {
                   for (int64_t i = 0; i < size; ++i) logits[h * c.row + t + i] = values[i];
                 });
    for (int64_t h = 0; h < c.heads; ++h) weigh(unit, b, h, first, count);
    multiply(Into<T>::sums(c.of_head(c.part_sums, unit, 0), c.stride), Factors<T>{logits, c.row, 1},
             c.heads, count, Matrix<T>{hat, c.stride}, c.vectors * L);
  }

  // The logits of one head's block become weights relative to the largest logit so far.
  void weigh(int64_t unit, int64_t b, int64_t h, int64_t first, int64_t count) const {
    T *line = logits + h * c.row, *stats = c.stats(unit, h), *kept = c.token_state(b, h) + first;
    for (int64_t t = count; t < round_up(count, L); ++t) line[t] = kLowest;
    V tops = splat(stats[kTop]);
    for (int64_t t = 0; t < count; t += L) {
      const V v = load(line + t);
      store_n(kept + t, v, count - t);
      tops = vmax(tops, v);
    }
    const T top = max_lanes(tops);
    if (top != stats[kTop]) raise(unit, h, top);
    if (c.dropout()) c.dropout_factors(b, h, first, count, factors);
    V sum{}, sum_kept{};
    for (int64_t t = 0; t < count; t += L) {
      V w = exp2_nonpositive(load(line + t) - top);
      sum += w;
      if (c.dropout()) {
        w = t + L > count ? load_n(factors + t, count - t) * w : load(factors + t) * w;
        sum_kept += w;
      }
      store(line + t, w);
    }
    stats[kSum] += sum_lanes(sum);
    stats[kKept] += sum_lanes(sum_kept);
  }

  void raise(int64_t unit, int64_t h, T top) const {
    T *stats = c.stats(unit, h), *sums = c.of_head(c.part_sums, unit, h);
    const T left = power(stats[kTop] - top);
    stats[kTop] = top;
    stats[kSum] *= left;
    stats[kKept] *= left;
    for (int64_t z = 0; z < c.vectors; ++z) store(sums + z * L, load(sums + z * L) * left);
  }

  void write_sums(int64_t b, int64_t h, T top, T inverse, T share) const {
    T *pooled = c.of_head(c.pooled, b, h), *kept = c.pooled_hat(b, h);
    for (int64_t z = 0; z < c.vectors; ++z) {
      V sum{};
      for (int64_t p = 0; p < c.parts; ++p) {
        const int64_t unit = b * c.parts + p;
        sum += load(c.of_head(c.part_sums, unit, h) + z * L) * power(c.stats(unit, h)[kTop] - top);
      }
      sum *= inverse;
      c.put(kept, z, sum);
      store(pooled + z * L, sum * c.norm_weight(z) + c.norm_shift(z) * share);
    }
  }

  void write_weights(T* line, T top, T inverse) const {
    for (int64_t t = 0; t < c.tokens; t += L) {
      const int64_t left = c.tokens - t;
      store_n(line + t, exp2_nonpositive(load_n(line + t, left) - top) * inverse, left);
    }
  }
};

}  // namespace xattn::XATTN_ISA::clsattn
