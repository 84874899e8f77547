// Backward of conv-relative attention: one group of heads of some images.
//
// With P = softmax(K), A = P^T V and out = s Q A + Q * (conv(V) + b), grad_out G gives
//   dA = s Q^T G      dQ = s G A^T + G * (conv(V) + b)      E = Q * G
//   dV = P dA + conv^T(E)      dK = P * (V dA^T - rowsum(dA * A))      dw = E (*) V      db = sum E
// so nothing but A and the column statistics is kept from the forward, and two passes over the
// tokens suffice: one for dA, one for the rest, image row by image row.
#pragma once

#include "convrel_group.h"

namespace xattn::XATTN_ISA::convrel {

template <class S>
struct Backward {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  Group<S> g;
  GroupTaps<S> taps, flipped, sums;     // sums: the gradients of the taps
  PaddedRows<T> values, relative;       // v, and E where there are taps
  T *queries, *grads, *keys, *product;  // of some tokens: q, grad_out, P, a matrix product
  T *maximum, *inverse, *delta;         // [stride]: delta = rowsum(dA * A)
  T* context_t;                         // [heads]: s A^T
  T *grad_context, *grad_context_t;     // [heads]: dA, dA^T
  int64_t bytes;

  Backward(const ConvRelArgs& a, void* memory) : Backward(a, Arena(memory), memory != nullptr) {}
  Backward(const ConvRelArgs& a, Arena arena, bool real)
      : g(a),
        taps(g, a.conv, arena, real),
        flipped(g, a.conv, arena, real),
        sums(g, a.conv, arena, real),
        values(arena, a.height, a.width, g.vectors, a.conv.largest, g.rows),
        relative(arena, taps.count() ? a.height : 0, a.width, g.vectors, a.conv.largest, g.rows) {
    T** const of_tokens[] = {&queries, &grads, &keys, &product};
    for (T** each : of_tokens) *each = arena.take<T>(g.row_tokens() * g.stride + L);
    T** const of_channels[] = {&maximum, &inverse, &delta};
    for (T** each : of_channels) *each = arena.take<T>(g.stride + L);
    T** const of_heads[] = {&context_t, &grad_context, &grad_context_t};
    for (T** each : of_heads) *each = arena.take<T>(g.heads.size());
    bytes = arena.used();
  }

  void run(const ConvRelChunk* chunks, int64_t count) {
    values.clear();
    relative.clear();
    for (int64_t i = 0; i < g.heads.size(); ++i) context_t[i] = grad_context_t[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (chunks[i].group != g.index) {
        g.select(chunks[i].group);
        taps.pack(false);
        flipped.pack(true);
      }
      sums.clear(taps);
      run(chunks[i]);
    }
  }

 private:
  void run(const ConvRelChunk& chunk) {
    for (g.image = chunk.image_begin; g.image < chunk.image_end; ++g.image) {
      sum_grad_context();
      read_state();
      for (int64_t first = 0; first < g.args.prefix; first += g.block) {
        prefix_gradients(first, min_of(g.block, g.args.prefix - first));
      }
      image_gradients();
    }
    sums.write(static_cast<T*>(chunk.grad_weight), static_cast<T*>(chunk.grad_bias));
  }

  // ---------------------------------------------------------------- dA and what follows from it

  void sum_grad_context() const {
    const int64_t tokens = g.args.tokens();
    for (int64_t i = 0; i < g.heads.size(); ++i) grad_context[i] = 0;
    for (int64_t first = 0; first < tokens; first += g.block) {
      const int64_t count = min_of(g.block, tokens - first);
      const int64_t q_token = g.args.qkv_stride[1], grad_token = g.args.grad_out_stride[1];
      g.prefetch(g.qkv(kQuery, first + count), q_token, count);
      g.prefetch(g.grad_out(first + count), grad_token, count);
      const auto q = g.view(g.qkv(kQuery, first), q_token, count, queries);
      const auto grad = g.view(g.grad_out(first), grad_token, count, grads, !g.heads.exact());
      g.heads.add_outer(count, q, grad, grad_context);
    }
    for (int64_t i = 0; i < g.heads.size(); i += L) {
      store(grad_context + i, load(grad_context + i) * (T)g.args.scale);
    }
  }

  void read_state() const {
    const int64_t dim = g.heads.dim, width = dim + 2;
    for (int64_t h = 0; h < g.heads.count; ++h) {
      const T* state = g.state(h);
      for (int64_t i = 0; i < dim; ++i) {
        const T* grad = grad_context + g.heads.at(h, i, 0);
        vec<T> sum{};
        for (int64_t j = 0; j < dim; j += L) {
          sum += load_n(grad + j, dim - j) * load_n(state + i * width + j, dim - j);
        }
        delta[h * dim + i] = sum_lanes(sum);
        maximum[h * dim + i] = state[i * width + dim];
        inverse[h * dim + i] = state[i * width + dim + 1];
      }
      g.heads.transpose_head(h, grad_context + g.heads.at(h, 0, 0), g.heads.columns * L, (T)1,
                             grad_context_t);
      g.heads.transpose_head(h, state, width, (T)g.args.scale, context_t);
    }
  }

  // ---------------------------------------------------------------- gradients of tokens

  // keys = P of tokens [first, first + count), whose G it returns.
  TokenView<T> take_tokens(int64_t first, int64_t count) const {
    g.for_vectors(g.qkv(kKey, first), g.args.qkv_stride[1], count,
                  [&](int64_t z, int64_t t, auto k) XATTN_LAMBDA_INLINE {
                    const auto e = exp2_for<S>((k - load(maximum + z * L)) * (T)kLog2e);
                    store(keys + t * g.stride + z * L, e * load(inverse + z * L));
                  });
    return g.view(g.grad_out(first), g.args.grad_out_stride[1], count, grads);
  }

  // Writes part `part` of grad_qkv of `count` tokens: value(z, t) is vector z of token t.
  template <class F>
  XATTN_MEMBER void write(int part, int64_t first, int64_t count, F value) const {
    S* to = g.grad_qkv(part, first);
    for (int64_t z = 0; z < g.vectors; ++z) {
      for (int64_t t = 0; t < count; ++t) {
        g.put(to + t * 3 * g.args.channels(), z, value(z, t * g.stride + z * L));
      }
    }
  }
  void write_product(int part, int64_t first, int64_t count) const {
    write(part, first, count,
          [&](int64_t, int64_t at) XATTN_LAMBDA_INLINE { return load(product + at); });
  }

  // dK of the tokens of `keys`.
  void write_keys(int64_t first, int64_t count) const {
    const auto v = g.view(g.qkv(kValue, first), g.args.qkv_stride[1], count, queries);
    g.heads.multiply(count, v, grad_context_t, product);
    write(kKey, first, count, [&](int64_t z, int64_t i) XATTN_LAMBDA_INLINE {
      return load(keys + i) * (load(product + i) - load(delta + z * L));
    });
  }

  void prefix_gradients(int64_t first, int64_t count) const {
    const TokenView<T> grad = take_tokens(first, count);
    g.heads.multiply(count, grad, context_t, product);
    write_product(kQuery, first, count);
    g.heads.multiply(count, {keys, g.stride}, grad_context, product);
    write_product(kValue, first, count);
    write_keys(first, count);
  }

  // ---------------------------------------------------------------- gradients of the image

  void image_gradients() const {
    int64_t ready = 0;  // rows of v and E in scratch
    for (int64_t y = 0; y < g.args.height; y += g.rows) {
      const int64_t count = min_of(g.rows, g.args.height - y), width = g.args.width;
      for (; ready < min_of(g.args.height, y + count + values.margin); ++ready) add_row(ready);
      const TokenView<T> grad = take_tokens(g.token_of(y), count * width);
      g.heads.multiply(count * width, grad, context_t, product);
      if (taps.count() == 0) write_product(kQuery, g.token_of(y), count * width);
      for (int64_t i = 0; taps.count() && i < count; ++i) {
        add_to_queries(y + i, {product + i * width * g.stride, g.stride}, grad.from(i * width));
      }
      g.heads.multiply(count * width, {keys, g.stride}, grad_context, product);
      if (taps.count() == 0) write_product(kValue, g.token_of(y), count * width);
      for (int64_t i = 0; taps.count() && i < count; ++i) {
        add_to_values(y + i, {product + i * width * g.stride, g.stride});
        sums.add_row(values, relative, y + i);
      }
      write_keys(g.token_of(y), count * width);
    }
  }

  // Row y of v, and of E, whose sum is the gradient of the bias.
  void add_row(int64_t y) const {
    const int64_t first = g.token_of(y), width = g.args.width;
    g.gather_lines(g.qkv(kValue, first), g.args.qkv_stride[1], width, values.row(y), values.line);
    if (!taps.count()) return;
    const S* grad = g.grad_out(first);
    T* row = relative.row(y);
    g.for_vectors(g.qkv(kQuery, first), g.args.qkv_stride[1], width,
                  [&](int64_t z, int64_t x, auto q) XATTN_LAMBDA_INLINE {
                    const S* at = grad + x * g.args.grad_out_stride[1] + z * L;
                    store(row + z * relative.line + x * L, q * load_n(at, g.channels - z * L));
                  });
    sums.add_bias_row(relative, y);
  }

  // dQ = sum + G * (conv(v) + b) of image row y. What later rows read and write is asked for here
  // and below, where the arithmetic hides the memory.
  void add_to_queries(int64_t y, TokenView<T> sum, TokenView<T> grad) const {
    const int64_t token = g.args.qkv_stride[1], written = 3 * g.args.channels();
    const int64_t width = g.args.width;
    const int64_t later = g.token_of(y + g.rows + values.margin);
    const S *next_q = g.qkv(kQuery, later), *next_v = g.qkv(kValue, later);
    S* out = g.grad_qkv(kQuery, g.token_of(y));
    for (int64_t z = 0; z < g.vectors; ++z) {
      const bool asks_q = g.asks(0, z), asks_v = g.asks(1, z), asks_out = g.asks(2, z);
      const T* conv = taps.convolve_line(values, y, z, z, [=](int64_t x) XATTN_LAMBDA_INLINE {
        if (asks_q) prefetch_line(next_q + x * token + z * L);
        if (asks_v) prefetch_line(next_v + x * token + z * L);
        if (asks_out) prefetch_to_write(out + (x + width) * written + z * L);
      });
      g.write_relative(z, sum, grad, conv, out, written);
    }
  }

  // dV = sum + transposed conv(E) of image row y.
  void add_to_values(int64_t y, TokenView<T> sum) const {
    const int64_t token = g.args.qkv_stride[1], channels = g.args.channels();
    const int64_t written = 3 * channels;
    const int64_t grad_token = g.args.grad_out_stride[1], width = g.args.width;
    const S* next_grad = g.grad_out(g.token_of(y + g.rows + values.margin));
    const S* next_k = g.qkv(kKey, g.token_of(y + g.rows));
    S* out = g.grad_qkv(kValue, g.token_of(y));
    for (int64_t z = 0; z < g.vectors; ++z) {
      const bool asks_grad = g.asks(0, z), asks_k = g.asks(1, z);
      const bool asks_out = g.asks(2, z), asks_keys = g.asks(3, z);
      const T* conv = flipped.convolve_line(relative, y, z, z, [=](int64_t x) XATTN_LAMBDA_INLINE {
        if (asks_grad) prefetch_line(next_grad + x * grad_token + z * L);
        if (asks_k) prefetch_line(next_k + x * token + z * L);
        if (asks_out) prefetch_to_write(out + (x + width) * written + z * L);
        if (asks_keys) prefetch_to_write(out + x * written - channels + z * L);  // dK
      });
      g.with_lanes(z, [&](auto lanes) XATTN_LAMBDA_INLINE {
        for (int64_t x = 0; x < width; ++x) {
          const auto mixed = load(sum.data + x * sum.stride + z * L);
          store_n(out + x * written + z * L, mixed + load(conv + x * L), lanes);
        }
      });
    }
  }
};

}  // namespace xattn::XATTN_ISA::convrel
