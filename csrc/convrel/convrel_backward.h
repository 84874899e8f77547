// Backward of conv-relative attention: one group of heads of some images.
//
// With P = softmax(K), A = P^T V and out = s Q A + Q * (conv(V) + b), grad_out G gives
//   dA = s Q^T G      dQ = s G A^T + G * (conv(V) + b)      E = Q * G
//   dV = P dA + conv^T(E)      dK = P * (V dA^T - rowsum(dA * A))      dw = E (*) V      db = sum E
// so nothing but A and the column statistics is kept from the forward, and two passes over the
// tokens suffice: one for dA, one for the rest, image row by image row.
#pragma once

#include "convrel_group.h"

namespace xattn::XATTN_ISA {

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
        values(arena, a.height, a.width, g.stride, a.conv.largest, g.rows),
        relative(arena, taps.count() ? a.height : 0, a.width, g.stride, a.conv.largest, g.rows) {
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
      g.gather_ahead(g.qkv(kQuery, first), g.args.qkv_stride[1], count, queries);
      g.gather_ahead(g.grad_out(first), g.args.grad_out_stride[1], count, grads);
      g.heads.add_outer(count, queries, grads, grad_context);
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

  // `grads` and `keys` of tokens [first, first + count).
  void gather_tokens(int64_t first, int64_t count) const {
    g.gather(g.grad_out(first), g.args.grad_out_stride[1], count, grads);
    g.gather(g.qkv(kKey, first), g.args.qkv_stride[1], count, keys);
    for (int64_t z = 0; z < g.vectors; ++z) {
      const auto top = load(maximum + z * L), scale = load(inverse + z * L);
      for (int64_t t = 0; t < count; ++t) {
        T* key = keys + t * g.stride + z * L;
        store(key, exp2_for<S>((load(key) - top) * (T)kLog2e) * scale);
      }
    }
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
    g.gather(g.qkv(kValue, first), g.args.qkv_stride[1], count, queries);
    g.heads.multiply(count, queries, grad_context_t, product);
    write(kKey, first, count, [&](int64_t z, int64_t i) XATTN_LAMBDA_INLINE {
      return load(keys + i) * (load(product + i) - load(delta + z * L));
    });
  }

  void prefix_gradients(int64_t first, int64_t count) const {
    gather_tokens(first, count);
    g.heads.multiply(count, grads, context_t, product);
    write_product(kQuery, first, count);
    g.heads.multiply(count, keys, grad_context, product);
    write_product(kValue, first, count);
    write_keys(first, count);
  }

  // ---------------------------------------------------------------- gradients of the image

  void image_gradients() const {
    int64_t ready = 0;  // rows of v and E in scratch
    for (int64_t y = 0; y < g.args.height; y += g.rows) {
      const int64_t count = min_of(g.rows, g.args.height - y), width = g.args.width;
      for (; ready < min_of(g.args.height, y + count + values.margin); ++ready) add_row(ready);
      gather_tokens(g.token_of(y), count * width);
      g.heads.multiply(count * width, grads, context_t, product);
      if (taps.count() == 0) write_product(kQuery, g.token_of(y), count * width);
      for (int64_t i = 0; taps.count() && i < count; ++i) {
        add_to_queries(y + i, i * width * g.stride);
      }
      g.heads.multiply(count * width, keys, grad_context, product);
      if (taps.count() == 0) write_product(kValue, g.token_of(y), count * width);
      for (int64_t i = 0; taps.count() && i < count; ++i) {
        add_to_values(y + i, i * width * g.stride);
        sums.add_row(values, relative, y + i);
      }
      write_keys(g.token_of(y), count * width);
    }
  }

  // Row y of v, and of E, whose sum is the gradient of the bias.
  void add_row(int64_t y) const {
    const int64_t first = g.token_of(y), width = g.args.width;
    g.gather(g.qkv(kValue, first), g.args.qkv_stride[1], width, values.row(y));
    if (!taps.count()) return;
    T* row = relative.row(y);
    g.gather(g.qkv(kQuery, first), g.args.qkv_stride[1], width, row);
    g.gather(g.grad_out(first), g.args.grad_out_stride[1], width, grads);
    for (int64_t z = 0; z < g.vectors; ++z) {
      for (int64_t x = 0; x < width; ++x) {
        T* at = row + x * g.stride + z * L;
        store(at, load(at) * load(grads + x * g.stride + z * L));
      }
    }
    sums.add_bias_row(relative, y);
  }

  // dQ = product + G * (conv(v) + b) of image row y, whose product and G begin at `at`. What later
  // rows read and write is asked for here and below, where the arithmetic hides the memory.
  void add_to_queries(int64_t y, int64_t at) const {
    const int64_t token = g.args.qkv_stride[1], written = 3 * g.args.channels();
    const int64_t later = g.token_of(y + g.rows + values.margin);
    const S *next_q = g.qkv(kQuery, later), *next_v = g.qkv(kValue, later);
    S* out = g.grad_qkv(kQuery, g.token_of(y));
    for (int64_t z = 0; z < g.vectors; ++z) {
      const T *sum = product + at + z * L, *grad = grads + at + z * L;
      taps.convolve(values, y, z, [&](int64_t x, auto conv) XATTN_LAMBDA_INLINE {
        prefetch_line(next_q + x * token + z * L);
        prefetch_line(next_v + x * token + z * L);
        prefetch_to_write(out + (x + g.args.width) * written + z * L);
        g.put(out + x * written, z, load(sum + x * g.stride) + load(grad + x * g.stride) * conv);
      });
    }
  }

  // dV = product + transposed conv(E) of image row y, whose product begins at `at`.
  void add_to_values(int64_t y, int64_t at) const {
    const int64_t token = g.args.qkv_stride[1], written = 3 * g.args.channels();
    const int64_t grad_token = g.args.grad_out_stride[1];
    const S* next_grad = g.grad_out(g.token_of(y + g.rows + values.margin));
    const S* next_k = g.qkv(kKey, g.token_of(y + g.rows));
    S* out = g.grad_qkv(kValue, g.token_of(y));
    for (int64_t z = 0; z < g.vectors; ++z) {
      const T* sum = product + at + z * L;
      flipped.convolve(relative, y, z, [&](int64_t x, auto conv) XATTN_LAMBDA_INLINE {
        prefetch_line(next_grad + x * grad_token + z * L);
        prefetch_line(next_k + x * token + z * L);
        prefetch_to_write(out + (x + g.args.width) * written + z * L);
        prefetch_to_write(out + x * written - g.args.channels() + z * L);  // dK
        g.put(out + x * written, z, load(sum + x * g.stride) + conv);
      });
    }
  }
};

}  // namespace xattn::XATTN_ISA
