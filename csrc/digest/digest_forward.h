// Forward of digest attention: blocks of queries against all keys of their image and head.
#pragma once

#include "digest_bias.h"

namespace xattn::XATTN_ISA::digest {

template <class U>
struct Forward {
  using S = typename U::Storage;
  using T = typename U::T;
  using V = typename U::V;
  using Elem = typename U::Elem;
  using Weight = typename U::Weight;
  static constexpr int R = U::kRows, L = U::L;
  static constexpr int64_t kTiles = 3;  // of queries in a block: they share a visit to the keys
  static constexpr int64_t kChunkVectors = 512 / L;  // of keys, whose logits stay in cache

  const U& u;
  BlockBias<U> bias;
  uint32_t* index;
  Elem *keys, *values, *queries;
  T* scores;        // [rows][stride]
  Weight* weights;  // the same, as the products read it
  T *dropout, *sums_out;
  // Per tile [2 * L]: of each row the largest logit so far, the sum of the weights and its
  // reciprocal, and what the latest chunk of keys multiplied earlier ones by.
  T *top, *sum, *inverse, *fading;

  // Keys are taken in chunks of nearly equal size, one where they are few; in vectors.
  int64_t chunks() const { return (u.vectors() + kChunkVectors - 1) / kChunkVectors; }
  int64_t chunk_begin(int64_t i) const { return i * u.vectors() / chunks(); }
  int64_t chunk_vectors() const { return (u.vectors() + chunks() - 1) / chunks(); }
  int64_t stride() const { return u.stride(chunk_vectors()); }
  int64_t factor_stride() const { return u.factor_stride(chunk_vectors()); }

  static int64_t blocks(const U& u) { return (u.tiles(u.args.tokens) + kTiles - 1) / kTiles; }

  static int64_t scratch(const DigestArgs& a) {
    Arena arena(nullptr);
    const U u{a};
    Forward f(u, arena);
    return arena.used();
  }

  Forward(const U& u, Arena& arena) : u(u), bias(u, kTiles * R, arena) {
    index = arena.take<uint32_t>(u.index_size());
    keys = arena.take<Elem>(u.transposed_size());
    values = arena.take<Elem>(u.values_size());
    queries = arena.take<Elem>(kTiles * R * u.stride_d());
    scores = arena.take<T>(kTiles * R * stride());
    weights = U::kPairs ? arena.take<Weight>(kTiles * R * stride()) : (Weight*)scores;
    dropout = arena.take<T>(u.args.dropout_p > 0 ? (kTiles * R + 6) * factor_stride() : 0);
    sums_out = arena.take<T>(chunks() > 1 ? kTiles * R * u.width_d() : 0);
    top = arena.take<T>(kTiles * 2 * L);
    sum = arena.take<T>(kTiles * 2 * L);
    inverse = arena.take<T>(kTiles * 2 * L);
    fading = arena.take<T>(kTiles * 2 * L);
  }

  void set_unit(int64_t b, int64_t head) {
    const auto k = key_rows<S>(u.args, index, b, head, 0);
    const auto v = key_rows<S>(u.args, index, b, head, 1);
    const int64_t count = u.args.keys(), padded = u.vectors() * L;
    U::P::transposed([&](int64_t i) XATTN_LAMBDA_INLINE { return k.row(i); }, count, padded, u.d(),
                     u.steps_d(), keys);
    U::P::values([&](int64_t i) XATTN_LAMBDA_INLINE { return v.row(i); }, count, padded, u.d(),
                 u.width_d(), values);
    bias.set_head(head);
  }

  // Logits of the block against vectors [first, last) of the keys.
  void score(int64_t tiles, int64_t first, int64_t last) const {
    const int64_t stride = this->stride();
    for_columns<U::kColumns, 1>(last - first, [&](auto group, int64_t at) XATTN_LAMBDA_INLINE {
      constexpr int C = decltype(group)::value;
      for (int64_t r0 = 0; r0 < tiles * R; r0 += R) {
        V acc[R][C];
        u.logits(acc, queries + r0 * u.stride_d(), keys, bias, r0, first + at);
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          XATTN_UNROLL
          for (int c = 0; c < C; ++c) store(scores + (r0 + r) * stride + (at + c) * L, acc[r][c]);
        }
      }
    });
  }

  // From a tile's logits of one chunk to its weights; the first chunk starts the row's statistics.
  template <bool kDrops>
  XATTN_MEMBER void softmax(int64_t tile, int64_t count, bool starts, const T* factors) const {
    const int64_t stride = this->stride();
    T* s = scores + tile * R * stride;
    Weight* w = weights + tile * R * stride;
    T *top = this->top + tile * 2 * L, *sum = this->sum + tile * 2 * L;
    T* fading = this->fading + tile * 2 * L;
    alignas(64) T fresh[2 * L];
    V rows[R];
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) rows[r] = load(s + r * stride);
    for (int64_t c = L; c < count * L; c += L) {
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) rows[r] = vmax(rows[r], load(s + r * stride + c));
    }
    fold_each<Max>(rows, fresh);
    for (int r = 0; r < R; r += L) {
      V highest = vmax(splat(T(kLowest)), load(fresh + r));
      if (!starts) {
        highest = vmax(load(top + r), highest);
        store(fading + r, U::exp2(load(top + r) - highest));
      }
      store(top + r, highest);
    }
    // A few rows at a time: enough to hide the latency of 2^x, and their addresses fit in
    // registers.
    constexpr int kGroup = R % 5 == 0 ? 5 : R;
    XATTN_UNROLL
    for (int r0 = 0; r0 < R; r0 += kGroup) {
      XATTN_UNROLL
      for (int r = r0; r < r0 + kGroup; ++r) rows[r] = V{};
      for (int64_t c = 0; c < count * L; c += L) {
        XATTN_UNROLL
        for (int r = r0; r < r0 + kGroup; ++r) {
          V e = U::exp2(load(s + r * stride + c) - splat(top[r]));
          rows[r] += e;
          if constexpr (kDrops) e *= load(factors + r * factor_stride() + c);
          store(w + r * stride + c, e);
        }
      }
    }
    fold_each<Add>(rows, fresh);
    for (int r = 0; r < R; r += L) {
      V total = load(fresh + r);
      if (!starts) total += load(sum + r) * load(fading + r);
      store(sum + r, total);
      store(this->inverse + tile * 2 * L + r, 1 / total);
    }
  }

  // Rows of the output are short and far apart: their lines are fetched while scores are computed.
  static XATTN_MEMBER void prefetch_row(const S* row, int64_t d) {
    for (int64_t at = 0; at < d; at += 64 / (int64_t)sizeof(S)) prefetch_to_write(row + at);
  }

  void run(int64_t b, int64_t head, int64_t i0, int64_t rows) {
    const DigestArgs& a = u.args;
    const int64_t tiles = u.tiles(rows), stride = this->stride(), chunks = this->chunks();
    const S* q = (const S*)a.qkv + b * a.qkv_stride[0] + i0 * a.qkv_stride[1] + head * u.d();
    S* out = (S*)a.out + (b * a.tokens + i0) * a.channels() + head * u.d();
    U::P::rows([&](int64_t t) XATTN_LAMBDA_INLINE { return q + t * a.qkv_stride[1]; }, rows,
               tiles * R, u.d(), u.stride_d(), queries);
    bias.set_block(i0, rows);
    for (int64_t r = 0; r < rows; ++r) prefetch_row(out + r * a.channels(), u.d());
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk_begin(chunk), last = chunk_begin(chunk + 1);
      const int64_t count = min_of(last * L, a.keys()) - first * L;
      if (a.dropout_p > 0) {
        dropout_factors(a, index, b * a.heads + head, i0, tiles * R, first * L, (last - first) * L,
                        dropout, factor_stride());
      }
      score(tiles, first, last);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (a.dropout_p > 0) {
          const T* factors = dropout + (i0 % 4 + tile * R) * factor_stride();
          softmax<true>(tile, last - first, chunk == 0, factors);
        } else {
          softmax<false>(tile, last - first, chunk == 0, nullptr);
        }
        const T *inverse = this->inverse + tile * 2 * L, *fading = this->fading + tile * 2 * L;
        const int64_t left = rows - tile * R;
        u.template weighted_sum<R>(
            (const Elem*)(weights + tile * R * stride), stride / U::kStep, 1,
            values + first * L / U::kStep * u.width_d(), (count + U::kStep - 1) / U::kStep,
            [&](int r, int64_t c, V value) XATTN_LAMBDA_INLINE {
              if (chunks > 1) {
                T* earlier = sums_out + (tile * R + r) * u.width_d() + c;
                if (chunk > 0) value += load(earlier) * fading[r];
                store(earlier, value);
              }
              if (chunk + 1 < chunks || r >= left) return;
              store_n(out + (tile * R + r) * a.channels() + c, value * inverse[r], u.d() - c);
            });
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* stats = u.stats(b, head, i0 + r);
      stats[0] = top[r / R * 2 * L + r % R];
      stats[1] = inverse[r / R * 2 * L + r % R];
    }
  }
};

template <class U>
void forward_items(const DigestArgs& a, int64_t begin, int64_t end, void* scratch) {
  constexpr int R = U::kRows;
  const U u{a};
  Arena arena(scratch);
  Forward<U> f(u, arena);
  f.bias.clear();
  order_keys(a, f.index);
  const int64_t blocks = Forward<U>::blocks(u), tiles = u.tiles(a.tokens);
  int64_t unit = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item % blocks, head = item / blocks / a.batch;
    const int64_t b = item / blocks % a.batch;
    if (item / blocks != unit) f.set_unit(b, head);
    unit = item / blocks;
    const int64_t i0 = block * tiles / blocks * R, i1 = (block + 1) * tiles / blocks * R;
    f.run(b, head, i0, min_of(i1, a.tokens) - i0);
  }
}

}  // namespace xattn::XATTN_ISA::digest
