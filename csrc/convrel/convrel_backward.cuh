// The gradients of k and v. With P = softmax(K), M = P^T V, G = grad_out and E = q * G:
//
//   dM = s Q^T G    dV = P dM + conv^T(E)    dK = P * (V dM^T - rowsum(dM * M))
//
// dM and its row sums come from convrel_context.cuh. E waits where the gradient of q will be
// written last (convrel_forward.cuh); the convolution's own gradients are in
// depthwise_gradients.cuh.
#pragma once

#include "convrel_forward.cuh"

namespace xattn::convrel_cuda {

struct KeyValueArgs {
  const void *keys, *values;  // [batch, tokens, ...] at channel 0
  int64_t qkv_stride[2];
  const void* product;  // E, in the layout of the gradients
  const float* state;   // [batch][channels][head_dim + 2]: M, maximum of a column, 1 / sum
  const float* change;  // [batch][channels][head_dim + 1]: dM, row sums
  void *grad_keys, *grad_values;
  int64_t grad_stride;  // of a token, contiguous
  int64_t tokens;
  Bands bands;
  StripPlan plan;
  TapTable taps;
  bool vector;
};

template <class T>
using KeyValueMemory = StripMemory<T, 4, 2>;  // two stages of k and of v, P dM and V dM^T

// Where one block stands, and what its steps share.
template <class T>
struct KeyValues {
  const KeyValueArgs& a;
  const StripBlock& block;
  T* memory;
  const float *state, *change;  // of the image
  uint32_t blocks;              // where heads have one tile

  XATTN_DEVICE KeyValues(const KeyValueArgs& a, const StripBlock& block, T* memory)
      : a(a),
        block(block),
        memory(memory),
        state(a.state + block.image * a.bands.channels * (a.bands.unit + 2)),
        change(a.change + block.image * a.bands.channels * (a.bands.unit + 1)),
        blocks(0) {
    if (a.bands.tiles > 1) return;
    blocks = head_blocks(a.bands, block.band, block.channel, block.channel);
    fetch_matrix(block.channel, block.channel);
  }

  XATTN_DEVICE ChannelRows<T> rows_of(const void* data, int c) const {
    const T* image = static_cast<const T*>(data) + block.image * a.qkv_stride[0] + c;
    return {image, a.qkv_stride[1], block.band.end - c, a.vector};
  }
  XATTN_DEVICE T* keys(int stage) const {
    return memory + KeyValueMemory<T>::kInput + 2 * stage * kTileValues;
  }
  XATTN_DEVICE T* values(int stage) const { return keys(stage) + kTileValues; }
  XATTN_DEVICE float* product(int i) const {
    return reinterpret_cast<float*>(memory + KeyValueMemory<T>::kProduct) + i * kTileValues;
  }

  XATTN_DEVICE void load(int stage, const TokenTile& tile) const {
    load_tile<kTileTokens, kTileRow>(keys(stage), rows_of(a.keys, block.channel), tile);
    load_tile<kTileTokens, kTileRow>(values(stage), rows_of(a.values, block.channel), tile);
  }

  // dM of these channels of k and of v.
  XATTN_DEVICE void fetch_matrix(int row, int column) const {
    load_matrix(memory, change, a.bands.unit + 1, a.bands, block.band, row, column, false);
  }

  // P in the place of a tile of k that begins at channel `first`; zero beyond the band.
  XATTN_DEVICE void to_weights(T* tile, int first) const {
    const int pair = 2 * lane_id(), row_values = a.bands.unit + 2;
    float highest[2] = {}, inverse[2] = {};
    bool own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = first + pair + i;
      own[i] = c >= block.band.low && c < block.band.high;
      if (!own[i]) continue;
      const float* row = state + static_cast<int64_t>(c) * row_values + a.bands.unit;
      highest[i] = row[0];
      inverse[i] = row[1];
    }
    for (int t = threadIdx.x / 32; t < kTileTokens; t += kStripThreads / 32) {
      T* at = tile + t * kTileRow + pair;
      const auto key = load_pair(at);
      float p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p[i] = own[i] ? ptx::exp2((key.v[i] - highest[i]) * kLog2e) * inverse[i] : 0.f;
      }
      *reinterpret_cast<Pack<T, 2>*>(at) = {{from_float<T>(p[0]), from_float<T>(p[1])}};
    }
  }

  // P in the place of k, and both products.
  XATTN_DEVICE void multiply(int stage, const TokenTile& tile) const {
    to_weights(keys(stage), block.channel);
    __syncthreads();
    if (a.bands.tiles == 1) {
      TileProduct p_change;
      p_change.add<false>(keys(stage), memory, blocks);
      p_change.store(product(0));
      TileProduct v_change;
      v_change.add<true>(values(stage), memory, blocks);
      v_change.store(product(1));
    } else {
      multiply_tiles(tile);
    }
    __syncthreads();
  }

  // The same where heads have several tiles: the others are fetched again, and their matrices.
  XATTN_DEVICE void multiply_tiles(const TokenTile& tile) const {
    T* other = memory + KeyValueMemory<T>::kOther;
    TileProduct sums[2];
    for (int i = 0; i < 2 * a.bands.tiles; ++i) {
      const bool of_values = i % 2 == 1;
      const int c = block.band.start + i / 2 * kTileChannels;
      __syncthreads();  // all have done with what this overwrites
      fetch_matrix(of_values ? block.channel : c, of_values ? c : block.channel);
      load_tile<kTileTokens, kTileRow>(other, rows_of(of_values ? a.values : a.keys, c), tile);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      const uint32_t reached = head_blocks(a.bands, block.band, c, block.channel);
      if (of_values) {
        sums[1].add<true>(other, memory, reached);
      } else {
        to_weights(other, c);
        __syncthreads();
        sums[0].add<false>(other, memory, reached);
      }
    }
    sums[0].store(product(0));
    sums[1].store(product(1));
  }

  // The results of a thread's strip; back: its transposed convolution.
  XATTN_DEVICE void store(int stage, const TokenTile& tile, const StripItem& item,
                          const Strip& back) const {
    const int64_t image = block.image * a.tokens * a.grad_stride;
    T* grad_keys = static_cast<T*>(a.grad_keys) + image;
    T* grad_values = static_cast<T*>(a.grad_values) + image;
    const int c = block.channel + 2 * item.pair, first = item.row * tile.columns + item.column;
    float delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool own = c + i >= block.band.low && c + i < block.band.high;
      const int64_t row = static_cast<int64_t>(c + i) * (a.bands.unit + 1);
      delta[i] = own ? change[row + a.bands.unit] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      if (item.row >= tile.valid_rows || item.column + i >= tile.valid_columns) continue;
      const int at = (first + i) * kTileRow + 2 * item.pair;
      const int64_t to = tile.token(item.row, item.column + i) * a.grad_stride;
      const auto p = load_pair(keys(stage) + at);
      const auto p_change = load_pair(product(0) + at), v_change = load_pair(product(1) + at);
      store_pair(grad_values + to, c, block.band,
                 {{p_change.v[0] + back[i][0], p_change.v[1] + back[i][1]}}, a.vector);
      store_pair(grad_keys + to, c, block.band,
                 {{p.v[0] * (v_change.v[0] - delta[0]), p.v[1] * (v_change.v[1] - delta[1])}},
                 a.vector);
    }
  }
};

template <class T>
__global__ __launch_bounds__(kStripThreads, 3) void key_value_gradients(KeyValueArgs a) {
  SHARED_DYNAMIC(T, memory);
  const StripPlan& plan = a.plan;
  const StripBlock block(plan, a.bands);
  const int channels = block.band.end - block.channel, c = block.channel;
  if (channels <= 0) return;  // a tile that the band does not reach
  const KeyValues<T> work(a, block, memory);

  const auto load = [&](int stage, const TokenTile& tile) { work.load(stage, tile); };
  const StripItem plain(channels, kBlockStrips, 1);
  walk_plain(plan, block.part, load, [&](const TokenTile& tile) {
    work.multiply(0, tile);
    const Strip nothing = {};
    if (plain.active) work.store(0, tile, plain, nothing);
  });
  if (plan.height == 0) return;

  const int64_t first = block.image * a.tokens + plan.plain;
  const T* product = static_cast<const T*>(a.product) + first * a.grad_stride + c;
  const ChannelRows<T> image{product, a.grad_stride, channels, a.vector};
  const StripWalk<T> walk(plan, image, block.part, memory + KeyValueMemory<T>::ring(a.bands));
  const StripItem item(channels, plan.strips, plan.rows);
  const StripConvolution<T> convolution{walk, a.taps, item, c + 2 * item.pair};
  walk.run(load, [&](int stage, int y) {
    const TokenTile tile = walk.part.tile(plan, y);
    work.multiply(stage, tile);
    if (!item.active || item.row >= tile.valid_rows) return;
    Strip back = {};
    convolution.template add<true>(back, y);
    work.store(stage, tile, item, back);
  });
}

}  // namespace xattn::convrel_cuda
