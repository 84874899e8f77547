// Backward of inner-patch attention for any windows and heads, in three kernels: rows (statistics
// of the softmax, gradient of q), columns (gradients of k and v), and the bias. ipsa_backward.cuh
// has the equations. Each computes the scores tile by tile, channels going by kChunk.
#pragma once

#include "ipsa_gradients.cuh"

namespace xattn::ipsa_cuda {

// A tile of queries and a tile of keys of one head, a chunk of channels at a time.
template <class T>
struct TilePair {
  static constexpr int kD = kChunk<T>;
  T q[kTileSize<kD>], k[kTileSize<kD>], v[kTileSize<kD>], grad[kTileSize<kD>];
  TileTokens queries, keys;

  // s = Q K^T, dp = dO V^T, or both transposed, of the warp's 16 rows. Chunk `last` stays in shared
  // memory. new_queries, new_keys: which tiles are not there yet.
  template <bool kKeysAreRows>
  XATTN_DEVICE void multiply(const TileLoader<T, kD>& query, const TileLoader<T, kD>& key,
                             bool new_queries, bool new_keys, int last, float (&s)[kTile / 8][4],
                             float (&dp)[kTile / 8][4]) {
    const int chunks = (query.rows.a.head_dim + kD - 1) / kD, at = warp_id() * 16 * kRowStride<kD>;
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) s[i / 4][i % 4] = dp[i / 4][i % 4] = 0;
    for (int i = 1; i <= chunks; ++i) {
      const int d0 = (last + i) % chunks * kD;
      __syncthreads();  // what was loaded before was read
      if (i == 1) query.publish(queries);
      if (i == 1) key.publish(keys);
      if (chunks > 1 || new_queries) query.rows.load_qkv(0, q, d0);
      if (chunks > 1 || new_queries) query.rows.load_grad(grad, d0);
      if (chunks > 1 || new_keys) key.rows.load_qkv(1, k, d0);
      if (chunks > 1 || new_keys) key.rows.load_qkv(2, v, d0);
      wait_for_copies();
      multiply_rows<T, kD>(s, kKeysAreRows ? k + at : q + at, kKeysAreRows ? q : k);
      multiply_rows<T, kD>(dp, kKeysAreRows ? v + at : grad + at, kKeysAreRows ? grad : v);
    }
  }
};

// Of each query, [tokens of the tiles]. Apart, maximum and sum lose nothing to large logits.
template <class T>
struct Statistics {
  float* highest;  // its largest logit
  float* inverse;  // 1 / the sum of its exponentials above that
  float* delta;    // the product of its weights with their gradients

  XATTN_DEVICE Statistics(const Args<T>& a, int64_t unit) {
    const int64_t edge = a.tiles() * kTile;
    highest = a.statistics + unit * 3 * edge;
    inverse = highest + edge;
    delta = inverse + edge;
  }
};

// A block takes one tile of queries of one head and window; grid: windows x tiles x heads.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_rows(const Args<T> a) {
  constexpr int kD = kChunk<T>;
  SHARED_DYNAMIC(TilePair<T>, pair);
  const TiledBlock block(a);
  const int head = block.head, query_tile = block.tile, first_row = warp_id() * 16;
  const Window w = window_at(a, block.index);
  const int tiles = a.tiles();
  const int64_t unit = w.index * a.heads + head;
  const int first_query = query_tile * kTile + first_row;
  TileLoader<T, kD> query(a, head), key(a, head);
  query.find(w, query_tile);

  // The softmax's statistics, with a running maximum
  float s[kTile / 8][4], dp[kTile / 8][4];
  float delta[2] = {};
  RunningSoftmax softmax;
  for (int key_tile = 0; key_tile < tiles; ++key_tile) {
    key.find(w, key_tile);
    pair->template multiply<false>(query, key, key_tile == 0, true, 0, s, dp);
    finish_logits<false>(a, head, pair->queries, pair->keys, s);
    drop(a.dropout, keep_bits(a.dropout, unit, first_query, key_tile * kTile, a.tokens()), dp);
    float before[2];
    softmax.add(s, before);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float product = 0;
#pragma unroll
      for (int i = 0; i < kTile / 4; ++i) {
        product += s[i / 2][2 * half + i % 2] * dp[i / 2][2 * half + i % 2];
      }
      delta[half] = delta[half] * before[half] + quad_sum(product);
    }
  }
  const Statistics<T> statistics(a, unit);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    inverse[half] = 1 / softmax.total[half];
    delta[half] *= inverse[half];
    if (lane_column() == 0) {
      statistics.highest[first_query + lane_row(half)] = softmax.highest[half];
      statistics.inverse[first_query + lane_row(half)] = inverse[half];
      statistics.delta[first_query + lane_row(half)] = delta[half];
    }
  }

  const float scale[2] = {a.scale, a.scale};
  T* to[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    to[half] = grad_row(a, w, token_at(a, first_query + lane_row(half)), head);
  }
  for (int chunk = 0; chunk * kD < a.head_dim; ++chunk) {
    float sums[kD / 8][4] = {};
    for (int key_tile = 0; key_tile < tiles; ++key_tile) {
      key.find(w, key_tile);
      pair->template multiply<false>(query, key, false, true, chunk, s, dp);
      finish_logits<false>(a, head, pair->queries, pair->keys, s);
      drop(a.dropout, keep_bits(a.dropout, unit, first_query, key_tile * kTile, a.tokens()), dp);
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) {
        const int half = i % 4 / 2;
        float& ds = dp[i / 4][i % 4];
        const float p = exp_above(s[i / 4][i % 4], softmax.highest[half]) * inverse[half];
        ds = p * (ds - delta[half]);
      }
#pragma unroll
      for (int t = 0; t < kTile / 16; ++t) {
        multiply_columns<T, kD>(sums, weights_as_a<T>(dp, t), pair->k, t);
      }
    }
    store_rows<T, kD>(a, sums, scale, to, chunk * kD);
  }
}

template <class T>
struct ColumnsShared {
  TilePair<T> pair;
  PadSums<kChunk<T>> pads;
};

// A block takes one tile of keys of one head through a run of windows; grid: runs x tiles x heads.
// Rows are keys here, so that the transposed weights are where the products want them.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_columns(const Args<T> a) {
  constexpr int kD = kChunk<T>;
  SHARED_DYNAMIC(ColumnsShared<T>, shared);
  TilePair<T>& pair = shared->pair;
  const TiledBlock block(a);
  const int head = block.head, key_tile = block.tile, tiles = a.tiles();
  const int64_t first = block.index * a.block_run, count = run_length(a, first);
  const int first_key = key_tile * kTile + warp_id() * 16;
  const Token tokens[2] = {token_at(a, first_key + lane_row(0)),
                           token_at(a, first_key + lane_row(1))};
  TileLoader<T, kD> query(a, head), key(a, head);

  for (int chunk = 0; chunk * kD < a.head_dim; ++chunk) {
    shared->pads.clear();
    Window w = window_at(a, first);
    for (int64_t i = 0; i < count; ++i, w = next_window(a, w)) {
      const int64_t unit = w.index * a.heads + head;
      const Statistics<T> statistics(a, unit);
      float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
      key.find(w, key_tile);
      for (int query_tile = 0; query_tile < tiles; ++query_tile) {
        float p[kTile / 8][4], ds[kTile / 8][4];
        query.find(w, query_tile);
        pair.template multiply<true>(query, key, true, query_tile == 0, chunk, p, ds);
        finish_logits<true>(a, head, pair.keys, pair.queries, p);
        const int first_query = query_tile * kTile;
        const uint32_t keep =
            keep_bits_of_keys(a.dropout, unit, first_key, first_query, a.tokens());
        drop(a.dropout, keep, ds);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
          const int at = first_query + n * 8 + lane_column();
          const auto highest = *reinterpret_cast<const Pack<float, 2>*>(statistics.highest + at);
          const auto inverse = *reinterpret_cast<const Pack<float, 2>*>(statistics.inverse + at);
          const auto delta = *reinterpret_cast<const Pack<float, 2>*>(statistics.delta + at);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[n][e] = exp_above(p[n][e], highest.v[e % 2]) * inverse.v[e % 2];
            ds[n][e] = p[n][e] * (ds[n][e] - delta.v[e % 2]);
          }
        }
        drop(a.dropout, keep, p);
#pragma unroll
        for (int t = 0; t < kTile / 16; ++t) {
          multiply_columns<T, kD>(dk, weights_as_a<T>(ds, t), pair.q, t);
          multiply_columns<T, kD>(dv, weights_as_a<T>(p, t), pair.grad, t);
        }
      }
      const float scale[2] = {a.scale, a.scale}, one[2] = {1, 1};
      T *k_rows[2], *v_rows[2];
      bool padding[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const row = grad_row(a, w, tokens[half], head);
        k_rows[half] = row ? row + a.channels() : nullptr;
        v_rows[half] = row ? row + 2 * a.channels() : nullptr;
        padding[half] = tokens[half].real && !row;
      }
      store_rows<T, kD>(a, dk, scale, k_rows, chunk * kD);
      store_rows<T, kD>(a, dv, one, v_rows, chunk * kD);
      if (a.pad_parts) {
        shared->pads.add(0, dk, a.scale, padding);
        shared->pads.add(1, dv, 1, padding);
      }
    }
    __syncthreads();
    if (a.pad_parts) shared->pads.store(a, block.part, head, chunk * kD);
    __syncthreads();
  }
}

template <class T>
struct BiasShared {
  TilePair<T> pair;
  float sums[kTile * kSumStride];
};

// A block takes one tile of queries of one head through a run of windows, one tile of keys after
// the other; grid: runs x tiles x heads.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_bias(const Args<T> a) {
  constexpr int kD = kChunk<T>;
  SHARED_DYNAMIC(BiasShared<T>, shared);
  TilePair<T>& pair = shared->pair;
  const TiledBlock block(a);
  const int head = block.head, query_tile = block.tile, tiles = a.tiles();
  const int64_t first = block.index * a.block_run, count = run_length(a, first);
  const int first_query = query_tile * kTile + warp_id() * 16;
  TileLoader<T, kD> query(a, head), key(a, head);

  for (int key_tile = 0; key_tile < tiles; ++key_tile) {
    float sums[kTile / 8][4] = {};
    Window w = window_at(a, first);
    for (int64_t i = 0; i < count; ++i, w = next_window(a, w)) {
      const int64_t unit = w.index * a.heads + head;
      const Statistics<T> statistics(a, unit);
      float s[kTile / 8][4], dp[kTile / 8][4];
      query.find(w, query_tile);
      key.find(w, key_tile);
      pair.template multiply<false>(query, key, true, true, 0, s, dp);
      finish_logits<false>(a, head, pair.queries, pair.keys, s);
      drop(a.dropout, keep_bits(a.dropout, unit, first_query, key_tile * kTile, a.tokens()), dp);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float highest = statistics.highest[first_query + lane_row(half)];
        const float inverse = statistics.inverse[first_query + lane_row(half)];
        const float delta = statistics.delta[first_query + lane_row(half)];
#pragma unroll
        for (int j = 0; j < kTile / 4; ++j) {
          const int n = j / 2, e = 2 * half + j % 2;
          const float p = exp_above(s[n][e], highest) * inverse;
          sums[n][e] += p * (dp[n][e] - delta);
        }
      }
    }
    __syncthreads();  // the last tile's sums were read
    put_sums(sums, shared->sums);
    __syncthreads();
    add_bins(a, block.part, head, shared->sums, query_tile, key_tile, key_tile == 0);
  }
}

}  // namespace xattn::ipsa_cuda
