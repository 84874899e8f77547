// Forward of conv-relative attention: one group of heads of one image after another.
#pragma once

#include "convrel_group.h"

namespace xattn::XATTN_ISA::convrel {

// softmax(K)^T V of every head in one pass over the tokens: a block's maximum may raise the
// column's, and then all that was summed so far is scaled down.
template <class S>
struct ContextPass {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  const Group<S>& g;
  T *keys, *values;    // of a block: e^(k - maximum), v where it is copied
  T *maximum, *total;  // [stride]
  T* factor;           // [stride]: what a raised maximum leaves of the sums
  T* context;          // [heads][D][columns of a head]: the sums, in the end scale * context

  ContextPass(const Group<S>& g, Arena& arena) : g(g) {
    keys = arena.take<T>(g.block * g.stride + L);
    values = arena.take<T>(g.block * g.stride + L);
    maximum = arena.take<T>(g.stride);
    total = arena.take<T>(g.stride);
    factor = arena.take<T>(g.stride);
    context = arena.take<T>(g.heads.size() + L);
  }

  void run() const {
    for (int64_t i = 0; i < g.stride; ++i) {
      maximum[i] = kLowest;
      total[i] = 0;
    }
    for (int64_t i = 0; i < g.heads.size(); ++i) context[i] = 0;
    const int64_t tokens = g.args.tokens();
    for (int64_t first = 0; first < tokens; first += g.block) {
      add_block(first, min_of(g.block, tokens - first));
    }
    for (int64_t z = 0; z < g.vectors; ++z) {
      store(factor + z * L, (T)1 / load(total + z * L));
    }
    finish();
  }

 private:
  static constexpr int kTogether = 4;  // vectors of k that are read together
  static constexpr T kLowest = sizeof(T) == 4 ? (T)-3e38 : (T)-1e308;

  void add_block(int64_t first, int64_t count) const {
    const int64_t token = g.args.qkv_stride[1];
    const S* k = g.qkv(kKey, first);
    read_keys(k, token, count);
    raise_maximum(first == 0);
    add_exponentials(k + count * token, token, count);
    // Where the last head's vectors end beyond it, v may not be read in place.
    const auto v = g.view(g.qkv(kValue, first), token, count, values, !g.heads.exact());
    g.heads.add_outer(count, {keys, g.stride}, v, context);
  }

  // keys = k, factor = the larger of `maximum` and the block's.
  void read_keys(const S* k, int64_t token, int64_t count) const {
    const auto read = [&](auto size, int64_t first, auto lanes) XATTN_LAMBDA_INLINE {
      constexpr int n = decltype(size)::value;
      vec<T> top[n];
      XATTN_UNROLL
      for (int i = 0; i < n; ++i) top[i] = load(maximum + first + i * L);
      for (int64_t t = 0; t < count; ++t) {
        XATTN_UNROLL
        for (int i = 0; i < n; ++i) {
          const auto key = load_n(k + t * token + first + i * L, lanes);
          store(keys + t * g.stride + first + i * L, key);
          top[i] = vmax(top[i], key);
        }
      }
      XATTN_UNROLL
      for (int i = 0; i < n; ++i) store(factor + first + i * L, top[i]);
    };
    // Two cache lines at a time.
    const int64_t whole = g.channels / L;
    for_blocks<kTogether>(
        whole, [&](auto size, int64_t z) XATTN_LAMBDA_INLINE { read(size, z * L, Int<L>{}); });
    if (whole < g.vectors) read(Int<1>{}, whole * L, g.channels - whole * L);
  }

  // keys = e^(keys - maximum), added to `total`. Asks for the next block's k and v.
  void add_exponentials(const S* next, int64_t token, int64_t count) const {
    for (int64_t z = 0; z < g.vectors; ++z) {
      const auto top = load(maximum + z * L);
      vec<T> sum{};
      for (int64_t t = 0; t < count; ++t) {
        prefetch_line(next + t * token + z * L);
        prefetch_line(next + t * token + z * L + g.args.channels());
        T* key = keys + t * g.stride + z * L;
        const auto e = exp2_for<S>((load(key) - top) * (T)kLog2e);
        store(key, e);
        sum += e;
      }
      store(total + z * L, load(total + z * L) + sum);
    }
  }

  // `factor` holds the new maxima; afterwards what they leave of the old sums, if there are any.
  void raise_maximum(bool initial) const {
    bool raised = false;
    for (int64_t z = 0; z < g.vectors; ++z) {
      const auto old = load(maximum + z * L), top = load(factor + z * L);
      store(maximum + z * L, top);
      const auto left = exp2_nonpositive((old - top) * (T)kLog2e);
      store(factor + z * L, left);
      store(total + z * L, load(total + z * L) * left);
      raised |= sum_lanes(vec<T>(left < (T)1 ? vec<T>{} + (T)1 : vec<T>{})) > 0;
    }
    if (raised && !initial) g.heads.scale_rows(factor, context);
  }

  // The state from the sums, which become scale * context.
  void finish() const {
    const int64_t dim = g.heads.dim;
    const T scale = (T)g.args.scale;
    for (int64_t h = 0; h < g.heads.count; ++h) {
      T* state = g.state(h);
      for (int64_t i = 0; i < dim; ++i, state += dim + 2) {
        T* row = context + g.heads.at(h, i, 0);
        const T by = factor[h * dim + i];
        for (int64_t j = 0; j < dim; j += L) {
          const auto value = load_n(row + j, dim - j) * by;
          store_n(state + j, value, dim - j);
          store_n(row + j, value * scale, dim - j);
        }
        state[dim] = maximum[h * dim + i];
        state[dim + 1] = by;
      }
    }
  }
};

template <class S>
struct Forward {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  Group<S> g;
  ContextPass<S> context;
  GroupTaps<S> taps;
  PaddedRows<T> values;
  T *queries, *mixed;  // of some tokens: q where it is copied, and scale * q (softmax(K)^T V)
  int64_t bytes;

  Forward(const ConvRelArgs& a, void* memory) : Forward(a, Arena(memory), memory) {}
  Forward(const ConvRelArgs& a, Arena arena, void* memory)
      : g(a),
        context(g, arena),
        taps(g, a.conv, arena, memory != nullptr),
        values(arena, taps.count() ? a.height : 0, a.width, g.vectors, a.conv.largest, g.rows) {
    queries = arena.take<T>(g.row_tokens() * g.stride + L);
    mixed = arena.take<T>(g.row_tokens() * g.stride + L);
    bytes = arena.used();
  }

  void run(int64_t begin, int64_t end) {
    values.clear();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / g.args.batch;
      g.image = unit % g.args.batch;
      if (group != g.index) {
        g.select(group);
        taps.pack(false);
      }
      context.run();
      mix_prefix();
      mix_image();
    }
  }

 private:
  // `mixed` of tokens [first, first + count), whose q it returns.
  TokenView<T> mix(int64_t first, int64_t count) const {
    const auto q = g.view(g.qkv(kQuery, first), g.args.qkv_stride[1], count, queries);
    g.heads.multiply(count, q, context.context, mixed);
    return q;
  }

  void mix_prefix() const {
    for (int64_t first = 0; first < g.args.prefix; first += g.block) {
      const int64_t count = min_of(g.block, g.args.prefix - first);
      mix(first, count);
      write(first, count);
    }
  }

  void write(int64_t first, int64_t count) const {
    S* to = g.out(first);
    for (int64_t z = 0; z < g.vectors; ++z) {
      for (int64_t t = 0; t < count; ++t) {
        g.put(to + t * g.args.channels(), z, load(mixed + t * g.stride + z * L));
      }
    }
  }

  void mix_image() const {
    int64_t ready = 0;  // rows of v in scratch
    for (int64_t y = 0; y < g.args.height; y += g.rows) {
      const int64_t count = min_of(g.rows, g.args.height - y);
      const TokenView<T> q = mix(g.token_of(y), count * g.args.width);
      if (taps.count() == 0) {
        write(g.token_of(y), count * g.args.width);
        continue;
      }
      for (; ready < min_of(g.args.height, y + count + values.margin); ++ready) {
        g.gather_lines(g.qkv(kValue, g.token_of(ready)), g.args.qkv_stride[1], g.args.width,
                       values.row(ready), values.line);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = i * g.args.width;
        add_relative(y + i, q.from(first), {mixed + first * g.stride, g.stride});
      }
    }
  }

  // out = sum + q * conv(v) for one image row. What the next rows read and write is asked for here,
  // where the arithmetic hides the memory.
  void add_relative(int64_t y, TokenView<T> q, TokenView<T> sum) const {
    const int64_t token = g.args.qkv_stride[1], channels = g.args.channels(), width = g.args.width;
    const S* next_q = g.qkv(kQuery, g.token_of(y + g.rows));
    const S* next_v = g.qkv(kValue, g.token_of(y + g.rows + values.margin));
    S* out = g.out(g.token_of(y));
    for (int64_t z = 0; z < g.vectors; ++z) {
      const bool asks_q = g.asks(0, z), asks_v = g.asks(1, z), asks_out = g.asks(2, z);
      const T* conv = taps.convolve_line(values, y, z, z, [=](int64_t x) XATTN_LAMBDA_INLINE {
        if (asks_q) prefetch_line(next_q + x * token + z * L);
        if (asks_v) prefetch_line(next_v + x * token + z * L);
        if (asks_out) prefetch_to_write(out + (x + width) * channels + z * L);
      });
      g.write_relative(z, sum, q, conv, out, channels);
    }
  }
};

}  // namespace xattn::XATTN_ISA::convrel
