// Some neighbouring channels of tokens: a row of vectors in scratch, a piece of a row in memory.
#pragma once

#include "loops.h"

namespace xattn::XATTN_ISA {

// Tokens as values of the compute type: in scratch, or in memory where that holds such values.
template <class T>
struct TokenView {
  const T* data;
  int64_t stride;

  TokenView from(int64_t token) const { return {data + token * stride, stride}; }
};

template <class S>
struct ChannelGroup {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;

  int64_t channels, vectors;
  int64_t stride;     // of a token in scratch
  int64_t first = 0;  // channel of the tensor

  // `end`: where the last vector that is read or written of a token ends. An odd number of vectors
  // spreads the tokens over the sets of the cache.
  ChannelGroup(int64_t channels, int64_t end)
      : channels(channels), vectors((channels + L - 1) / L), stride(((end + L - 1) / L | 1) * L) {}

  // Becomes piece `index` of `all` channels in pieces of `size`, which the group began with; the
  // last piece may be smaller.
  void select(int64_t index, int64_t size, int64_t all) {
    first = index * size;
    channels = min_of(size, all - first);
    vectors = (channels + L - 1) / L;
  }

  // Channels in vector z.
  int64_t lanes(int64_t z) const { return min_of<int64_t>(L, channels - z * L); }

  // Whether stream `index` of some is asked for at vector z: once for every cache line, and not all
  // streams at one vector where a line holds more.
  static constexpr bool asks(int64_t index, int64_t z) {
    constexpr int64_t bytes = L * (int64_t)sizeof(S), line = bytes < 64 ? 64 / bytes : 1;
    return z % line == index % line;
  }

  // use(lanes(z)), of a type that knows it where the vector is whole.
  template <class F>
  XATTN_MEMBER void with_lanes(int64_t z, F use) const {
    if (lanes(z) == L) {
      use(Int<L>{});
    } else {
      use(lanes(z));
    }
  }

  // use(z, t, values) for vector z of `count` tokens in memory, one vector of all tokens after the
  // other, so that what `use` keeps stays in registers.
  template <class F>
  XATTN_MEMBER void for_vectors(const S* from, int64_t from_stride, int64_t count, F use) const {
    const int64_t whole = channels / L;
    for (int64_t z = 0; z < whole; ++z) {
      for (int64_t t = 0; t < count; ++t) use(z, t, load(from + t * from_stride + z * L));
    }
    if (whole == vectors) return;
    const int64_t left = channels - whole * L;
    for (int64_t t = 0; t < count; ++t) {
      use(whole, t, load_n(from + t * from_stride + whole * L, left));
    }
  }

  // out[t][:] = `count` tokens in memory.
  void gather(const S* from, int64_t from_stride, int64_t count, T* out) const {
    const int64_t token = stride;  // a copy, which no store can be thought to change
    for_vectors(from, from_stride, count, [=](int64_t z, int64_t t, auto v) XATTN_LAMBDA_INLINE {
      store(out + t * token + z * L, v);
    });
  }
  // out[z][t] = vector z of `count` tokens in memory, lines of vectors `line` values apart.
  void gather_lines(const S* from, int64_t from_stride, int64_t count, T* out, int64_t line) const {
    for_vectors(from, from_stride, count, [=](int64_t z, int64_t t, auto v) XATTN_LAMBDA_INLINE {
      store(out + z * line + t * L, v);
    });
  }
  // The same, asking for as many tokens after them: where nothing else is at hand to hide the
  // memory behind.
  void gather_lines_ahead(const S* from, int64_t from_stride, int64_t count, T* out,
                          int64_t line) const {
    for_vectors(from, from_stride, count, [=](int64_t z, int64_t t, auto v) XATTN_LAMBDA_INLINE {
      prefetch_line(from + (t + count) * from_stride + z * L);
      store(out + z * line + t * L, v);
    });
  }
  // Asks for `count` tokens.
  void prefetch(const S* from, int64_t from_stride, int64_t count) const {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t z = 0; z < vectors; ++z) prefetch_line(from + t * from_stride + z * L);
    }
  }

  // `count` tokens where they are, or, of another type than the compute type or where `copy` says
  // so, in scratch.
  TokenView<T> view(const S* from, int64_t from_stride, int64_t count, T* scratch,
                    bool copy = false) const {
    if constexpr (__is_same(S, T)) {
      if (!copy) return {from, from_stride};
    }
    gather(from, from_stride, count, scratch);
    return {scratch, stride};
  }

  // `count` tokens from one place in memory to another.
  void copy(const S* from, int64_t from_stride, int64_t count, S* to, int64_t to_stride) const {
    for_vectors(from, from_stride, count, [&](int64_t z, int64_t t, auto v) XATTN_LAMBDA_INLINE {
      put(to + t * to_stride, z, v);
    });
  }

  // One vector of a token's results.
  void put(S* to, int64_t vector, vec<T> value) const {
    store_n(to + vector * L, value, channels - vector * L);
  }
};

}  // namespace xattn::XATTN_ISA
