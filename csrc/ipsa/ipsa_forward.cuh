// Forward of inner-patch attention: a kernel for windows of one tile and heads of at most kD
// channels, and one for any windows and heads.
#pragma once

#include "ipsa_tiled.cuh"

namespace xattn::ipsa_cuda {

// Where two windows fit, the next one is copied during the arithmetic of this one.
template <class T, int kD>
constexpr int kStages = kD * sizeof(T) <= 64 ? 2 : 1;

template <class T, int kD>
constexpr size_t kForwardShared = kStages<T, kD> * 3 * kTileSize<kD> * sizeof(T);

// A block takes one head through a run of windows of at most 8 kN tokens; grid: runs x heads. The
// bias stays in registers.
template <class T, int kD, int kN>
__global__ void __launch_bounds__(kThreads, kD <= 32 ? 4 : 3) forward_windows(const Args<T> a) {
  SHARED_DYNAMIC(T, stages);  // [kStages][q, k, v]
  const int head = blockIdx.x % a.heads;
  const int64_t first = blockIdx.x / a.heads * a.block_run;
  const int64_t count = run_length(a, first);

  RowLoader<T, kD> loader(a, head);
  const Token loaded = token_at(a, loader.row());
  const auto load = [&](const Window& w, T* stage) {
    loader.find(w, place_of(a, w, loaded));
    for (int which = 0; which < 3; ++which) loader.load_qkv(which, stage + which * kTileSize<kD>);
    ptx::cp_async_commit();
  };
  Window next = window_at(a, first), w = next;
  if (kStages<T, kD> == 2) load(next, stages);

  const int first_row = warp_id() * 16;
  const Token queries[2] = {token_at(a, first_row + lane_row(0)),
                            token_at(a, first_row + lane_row(1))};
  const ShiftMask mask(a);
  float bias[kN][4];
  window_bias(a, head, bias);

  for (int64_t i = 0; i < count; ++i) {
    T* const q = stages + (kStages<T, kD> == 2 ? i & 1 : 0) * 3 * kTileSize<kD>;
    T *const k = q + kTileSize<kD>, *const v = k + kTileSize<kD>;
    if (kStages<T, kD> == 1) {
      __syncthreads();  // the last window was read
      load(w, q);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    next = next_window(a, w);
    if (kStages<T, kD> == 2 && i + 1 < count) load(next, stages + (~i & 1) * 3 * kTileSize<kD>);

    float s[kN][4] = {};
    multiply_rows<T, kD>(s, q + first_row * kRowStride<kD>, k);
#pragma unroll
    for (int e = 0; e < 4 * kN; ++e) {
      s[e / 4][e % 4] = s[e / 4][e % 4] * a.scale + bias[e / 4][e % 4];
    }
    mask.apply(seams(a, w), s);
    float highest[2], total[2];
    row_max(s, highest);
    exponentials(s, highest, total);
    drop(a.dropout, keep_bits(a.dropout, w.index * a.heads + head, first_row, 0, a.tokens()), s);

    float sums[kD / 8][4] = {};
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
      multiply_columns<T, kD>(sums, weights_as_a<T>(s, t), v, t);
    }
    const float factor[2] = {1 / total[0], 1 / total[1]};
    T* const to[2] = {out_row(a, w, queries[0], head), out_row(a, w, queries[1], head)};
    store_rows<T, kD>(a, sums, factor, to);
    w = next;
  }
}

// A block takes one tile of queries of one head and window, and goes over the keys' tiles with a
// running maximum; grid: windows x tiles x heads. Channels go by kChunk: every chunk of the output
// repeats the scores.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) forward_tiled(const Args<T> a) {
  constexpr int kD = kChunk<T>;
  SHARED_DYNAMIC(T, memory);
  T *const q = memory, *const k = q + kTileSize<kD>, *const v = k + kTileSize<kD>;
  const TiledBlock block(a);
  const int head = block.head, query_tile = block.tile, first_row = warp_id() * 16;
  const Window w = window_at(a, block.index);
  const int tiles = a.tiles();
  const int chunks = (a.head_dim + kD - 1) / kD;

  SHARED(TileTokens, query_tokens, [1]);
  SHARED(TileTokens, key_tokens, [1]);
  TileLoader<T, kD> queries(a, head), keys(a, head);
  queries.find(w, query_tile);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float sums[kD / 8][4] = {};
    RunningSoftmax softmax;
    for (int key_tile = 0; key_tile < tiles; ++key_tile) {
      keys.find(w, key_tile);
      float s[kTile / 8][4] = {};
      for (int c = 0; c < chunks; ++c) {
        __syncthreads();  // what was loaded before was read
        if (c == 0) keys.publish(key_tokens[0]);
        if (c == 0) queries.publish(query_tokens[0]);
        if (chunks > 1 || key_tile == 0) queries.rows.load_qkv(0, q, c * kD);
        keys.rows.load_qkv(1, k, c * kD);
        if (c == 0) keys.rows.load_qkv(2, v, chunk * kD);
        wait_for_copies();
        multiply_rows<T, kD>(s, q + first_row * kRowStride<kD>, k);
      }
      finish_logits<false>(a, head, query_tokens[0], key_tokens[0], s);

      float before[2];
      softmax.add(s, before);
      const int64_t unit = w.index * a.heads + head;
      const int first_query = query_tile * kTile + first_row;
      drop(a.dropout, keep_bits(a.dropout, unit, first_query, key_tile * kTile, a.tokens()), s);
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) sums[i / 4][i % 4] *= before[i % 4 / 2];
#pragma unroll
      for (int t = 0; t < kTile / 16; ++t) {
        multiply_columns<T, kD>(sums, weights_as_a<T>(s, t), v, t);
      }
    }
    const float factor[2] = {1 / softmax.total[0], 1 / softmax.total[1]};
    T* to[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Token token = token_at(a, query_tile * kTile + first_row + lane_row(half));
      to[half] = out_row(a, w, token, head);
    }
    store_rows<T, kD>(a, sums, factor, to, chunk * kD);
  }
}

}  // namespace xattn::ipsa_cuda
