// The whole attention block of inference in one pass over the windows: tokens -> q, k, v ->
// attention -> projection, with nothing between them in memory but a window's scratch.
//
// A weight [N, K] comes packed: for each group of up to kMaxColumns vectors of outputs, [K][group].
#pragma once

#include "ipsa_forward.h"

namespace xattn::XATTN_ISA {

template <class U>
struct Block {
  using T = typename U::T;
  using V = typename U::V;
  static constexpr int L = U::L;
  static constexpr int64_t kInner = 128;

  const IpsaBlockArgs& block;
  const U& u;
  Forward<U> attention;     // on the window's scratch as if it were the whole map
  Window place;             // where the window's tokens are in x and out
  T *tokens, *qkv, *mixed;  // [rows][C], [rows][3C + slack], [rows][C]

  static int64_t channels(const IpsaArgs& a) { return round_up(a.channels(), L); }
  // Rows a power of two apart would fall into few sets of the cache.
  static int64_t qkv_row(const IpsaArgs& a) { return round_up(3 * a.channels(), L) + L; }

  Block(const IpsaBlockArgs& block, const U& u, Arena& arena)
      : block(block), u(u), attention(u, arena, u.args.heads), place(new_window(u.args, arena)) {
    tokens = arena.take<T>(u.rows() * channels(u.args));
    qkv = arena.take<T>(u.rows() * qkv_row(u.args));
    mixed = arena.take<T>(u.rows() * channels(u.args));
  }

  // out(t, j) = bias[j] + sum_k in[t][k] W[j][k] for all rows of the window; `emit` takes vectors.
  template <class Emit>
  void linear(const T* in, int64_t in_row, int64_t in_features, const T* packed, const T* bias,
              int64_t out_features, Emit emit) const {
    const int64_t vectors = round_up(out_features, L) / L;
    for_columns<kMaxColumns, 1>(vectors, [&](auto group, int64_t first) XATTN_LAMBDA_INLINE {
      constexpr int C = decltype(group)::value;
      V start[C];
      XATTN_UNROLL
      for (int c = 0; c < C; ++c) {
        const int64_t at = (first + c) * L;
        start[c] = bias ? load_n(bias + at, out_features - at) : V{};
      }
      const T* panel = packed + first * L * in_features;
      const auto tile = [&](auto rows, int64_t i0) XATTN_LAMBDA_INLINE {
        constexpr int R = decltype(rows)::value;
        // Sums of kInner products at a time, then their sum, then the bias: one long float sum
        // would be less exact than the blocked ones of a matrix library.
        alignas(64) T total[R][C * L];
        for (int64_t k0 = 0; k0 < in_features; k0 += kInner) {
          V acc[R][C] = {};
          tile_broadcast<typename U::Multiply>(acc, in + i0 * in_row + k0, in_row, 1,
                                               panel + k0 * C * L, C * L, L,
                                               min_of(kInner, in_features - k0));
          XATTN_UNROLL
          for (int r = 0; r < R; ++r) {
            XATTN_UNROLL
            for (int c = 0; c < C; ++c) {
              store(total[r] + c * L, k0 == 0 ? acc[r][c] : acc[r][c] + load(total[r] + c * L));
            }
          }
        }
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          XATTN_UNROLL
          for (int c = 0; c < C; ++c) {
            emit(i0 + r, (first + c) * L, load(total[r] + c * L) + start[c]);
          }
        }
      };
      if constexpr (U::kLoneRow) {  // with no more columns beside it: tiles of even sizes instead
        for_columns<U::kTileRows, 1>(u.n(), tile);
      } else {
        for (int64_t i0 = 0; i0 < u.n(); i0 += U::kTileRows) tile(Int<U::kTileRows>{}, i0);
      }
    });
  }

  void run(int64_t index, DenseTerms<U>& terms) {
    const IpsaArgs& a = block.map;
    const int64_t C = a.channels(), token_row = channels(a), row = qkv_row(a);
    locate(a, index, false, place);
    for (int64_t t = 0; t < u.n(); ++t) {
      // A token outside the image is zero, so its q, k, v are the bias.
      for (int64_t c = 0; c < C; c += L) {
        const T* from = (const T*)a.qkv + place.qkv[t] + c;
        store(tokens + t * token_row + c, place.qkv[t] < 0 ? V{} : load_n(from, C - c));
      }
    }
    linear(tokens, token_row, C, (const T*)block.qkv_weight, (const T*)block.qkv_bias, 3 * C,
           [&](int64_t t, int64_t c, V value)
               XATTN_LAMBDA_INLINE { store(qkv + t * row + c, value); });
    for (int64_t head = 0; head < a.heads; ++head) {
      attention.run(attention.windows[0][0], head, terms.bias(head), terms.mask(place.edge),
                    nullptr, attention.windows[0][0]);
    }
    linear(mixed, token_row, C, (const T*)block.proj_weight, (const T*)block.proj_bias, C,
           [&](int64_t t, int64_t c, V value) XATTN_LAMBDA_INLINE {
             if (t >= u.n() || place.pixel[t] < 0) return;
             store_n((T*)a.out + place.pixel[t] * C + c, value, C - c);
           });
  }
};

// The arguments of the attention inside a window: its map is the window's scratch.
template <class U>
IpsaArgs window_args(const IpsaArgs& map) {
  IpsaArgs a = map;
  a.pad_qkv = nullptr;
  a.out_pixel = Block<U>::channels(map);
  return a;
}

template <class U>
int64_t block_scratch(const IpsaBlockArgs& block) {
  const IpsaArgs inner = window_args<U>(block.map);
  const U u{inner};
  Arena arena(nullptr);
  Block<U> b(block, u, arena);
  return arena.used();
}

template <class U>
void block_windows(const IpsaBlockArgs& block, int64_t begin, int64_t end, void* scratch) {
  using T = typename U::T;
  IpsaArgs inner = window_args<U>(block.map);
  const U u{inner};
  Arena arena(scratch);
  Block<U> b(block, u, arena);
  inner.qkv = b.qkv;
  inner.out = b.mixed;
  const int64_t row = Block<U>::channels(inner);
  for (int64_t i = 0; i < u.rows() * row; ++i) b.tokens[i] = b.mixed[i] = T(0);
  for (int64_t t = 0; t < u.n(); ++t) {
    b.attention.windows[0][0].qkv[t] = t * Block<U>::qkv_row(inner);
    b.attention.windows[0][0].pixel[t] = t;
  }
  Arena dense(b.attention.dense_memory);
  DenseTerms<U> terms(u, 0, inner.heads, dense);
  terms.clear();
  for (int64_t index = begin; index < end; ++index) b.run(index, terms);
}

// [N, K] to the layout above; the columns that fill the last vector are zero.
template <class T>
void pack_weight(const T* weight, int64_t out_features, int64_t in_features, T* packed) {
  constexpr int L = Lanes<T>::n;
  for_columns<kMaxColumns, 1>(round_up(out_features, L) / L, [&](auto group, int64_t first) {
    constexpr int width = decltype(group)::value * L;
    T* panel = packed + first * L * in_features;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t out = first * L + j;
      for (int64_t k = 0; k < in_features; ++k) {
        panel[k * width + j] = out < out_features ? weight[out * in_features + k] : T(0);
      }
    }
  });
}

}  // namespace xattn::XATTN_ISA
