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
  T* context;          // [heads][D][columns of a head]

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
    g.heads.scale_rows(factor, context);
    write_state();
  }

 private:
  static constexpr T kLowest = sizeof(T) == 4 ? (T)-3e38 : (T)-1e308;

  void add_block(int64_t first, int64_t count) const {
    const int64_t token = g.args.qkv_stride[1];
    const S* k = g.qkv(kKey, first);
    find_maximum(k, token, count);
    raise_maximum();
    add_exponentials(k, token, count);
    // Where the last head's vectors end beyond it, v may not be read in place.
    const auto v = g.view(g.qkv(kValue, first), token, count, values, !g.heads.exact());
    g.heads.add_outer(count, {keys, g.stride}, v, context);
  }

  // factor = the larger of `maximum` and the block's.
  void find_maximum(const S* k, int64_t token, int64_t count) const {
    for (int64_t z = 0; z < g.vectors; ++z) {
      const bool whole = (z + 1) * L <= g.channels;
      auto top = load(maximum + z * L);
      for (int64_t t = 0; t < count; ++t) {
        const S* at = k + t * token + z * L;
        top = vmax(top, whole ? load(at) : load_n(at, g.channels - z * L));
      }
      store(factor + z * L, top);
    }
  }

  // keys = e^(k - maximum), added to `total`.
  void add_exponentials(const S* k, int64_t token, int64_t count) const {
    for (int64_t z = 0; z < g.vectors; ++z) {
      const bool whole = (z + 1) * L <= g.channels;
      const auto top = load(maximum + z * L);
      vec<T> sum{};
      for (int64_t t = 0; t < count; ++t) {
        const S* at = k + t * token + z * L;
        prefetch_line(at + count * token);  // the next block's k and v
        prefetch_line(at + count * token + g.args.channels());
        const auto key = whole ? load(at) : load_n(at, g.channels - z * L);
        const auto e = exp2_for<S>((key - top) * (T)kLog2e);
        store(keys + t * g.stride + z * L, e);
        sum += e;
      }
      store(total + z * L, load(total + z * L) + sum);
    }
  }

  // `factor` holds the new maxima; afterwards what they leave of the old sums.
  void raise_maximum() const {
    bool raised = false;
    for (int64_t z = 0; z < g.vectors; ++z) {
      const auto old = load(maximum + z * L), top = load(factor + z * L);
      store(maximum + z * L, top);
      const auto left = exp2_nonpositive((old - top) * (T)kLog2e);
      store(factor + z * L, left);
      store(total + z * L, load(total + z * L) * left);
      raised |= sum_lanes(vec<T>(left < (T)1 ? vec<T>{} + (T)1 : vec<T>{})) > 0;
    }
    if (raised) g.heads.scale_rows(factor, context);
  }

  void write_state() const {
    const int64_t dim = g.heads.dim;
    for (int64_t h = 0; h < g.heads.count; ++h) {
      T* state = g.state(h);
      for (int64_t i = 0; i < dim; ++i, state += dim + 2) {
        const T* row = context + g.heads.at(h, i, 0);
        for (int64_t j = 0; j < dim; j += L) store_n(state + j, load(row + j), dim - j);
        state[dim] = maximum[h * dim + i];
        state[dim + 1] = factor[h * dim + i];
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
        values(arena, taps.count() ? a.height : 0, a.width, g.stride, a.conv.largest, g.rows) {
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
      fold_scale();
      mix_prefix();
      mix_image();
    }
  }

 private:
  void fold_scale() const {
    for (int64_t i = 0; i < g.heads.size(); i += L) {
      store(context.context + i, load(context.context + i) * (T)g.args.scale);
    }
  }

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
        g.gather(g.qkv(kValue, g.token_of(ready)), g.args.qkv_stride[1], g.args.width,
                 values.row(ready));
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
    const int64_t token = g.args.qkv_stride[1], channels = g.args.channels();
    const S* next_q = g.qkv(kQuery, g.token_of(y + g.rows));
    const S* next_v = g.qkv(kValue, g.token_of(y + g.rows + values.margin));
    S* out = g.out(g.token_of(y));
    for (int64_t z = 0; z < g.vectors; ++z) {
      taps.convolve(values, y, z, [&](int64_t x, auto conv) XATTN_LAMBDA_INLINE {
        prefetch_line(next_q + x * token + z * L);
        prefetch_line(next_v + x * token + z * L);
        prefetch_to_write(out + (x + g.args.width) * channels + z * L);
        g.put(out + x * channels, z, g.get(sum, x, z) + g.get(q, x, z) * conv);
      });
    }
  }
};

}  // namespace xattn::XATTN_ISA::convrel
