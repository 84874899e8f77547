// The second pass over the tokens: scale x M + x * (conv(v) + bias), of q with M = softmax(K)^T V
// in the forward, of grad_out with its transpose in the backward, where it is the gradient of q.
//
// A block walks down a part of an image with the rows of v around it in a ring; the next step's
// rows are on their way during a step. Products go through shared memory to the threads that
// convolve.
#pragma once

#include "convrel_products.cuh"

namespace xattn::convrel_cuda {

struct MixArgs {
  const void *x, *values;  // [batch, tokens, ...] at channel 0
  int64_t x_stride[2], value_stride[2];
  const float* matrices;  // [batch][channels][row_values], of each channel its row of the head's
  void* out;              // [batch, tokens, ...] at channel 0, contiguous
  int64_t out_stride;     // of a token
  int64_t tokens;
  Bands bands;
  StripPlan plan;
  TapTable taps;
  int row_values;
  float scale;
  bool transposed, vector;
};

// Where a block of a grid stands: parts of an image x tiles of channels x bands x images.
struct StripBlock {
  int part;
  int channel, tile;  // the first of its tile, whose index is `tile`
  int64_t image;
  Band band;

  XATTN_DEVICE StripBlock(const StripPlan& plan, const Bands& bands) {
    int64_t at = blockIdx.x;
    part = static_cast<int>(at % plan.blocks());
    tile = static_cast<int>((at /= plan.blocks()) % bands.tiles);
    band = bands.of(static_cast<int>((at /= bands.tiles) % bands.count));
    image = at / bands.count;
    channel = band.start + tile * kTileChannels;
  }
};

// Shared memory of a block, in values of T: a matrix, tiles of the inputs, products in float, one
// more tile where heads have several, the ring.
template <class T, int kInputs, int kProducts>
struct StripMemory {
  static constexpr int kInput = kMatrixValues;
  static constexpr int kProduct = kInput + kInputs * kTileValues;
  static constexpr int kOther =
      kProduct + kProducts * kTileValues * static_cast<int>(sizeof(float) / sizeof(T));

  static size_t bytes(const Bands& bands, int ring_values) {
    return (ring(bands) + ring_values) * sizeof(T);
  }
  __host__ __device__ static int ring(const Bands& bands) {
    return kOther + (bands.tiles > 1 ? kTileValues : 0);
  }
};
template <class T>
using MixMemory = StripMemory<T, 2, 1>;  // two stages of x, x m

// product = x m. x is a tile of the block's own channels; heads of several tiles fetch the others,
// and their matrices.
template <class T>
XATTN_DEVICE void mix_product(const MixArgs& a, const StripBlock& block, const TokenTile& tile,
                              const ChannelRows<T>& rows, const T* x, uint32_t blocks, T* memory) {
  float* product = reinterpret_cast<float*>(memory + MixMemory<T>::kProduct);
  TileProduct sum;
  if (a.bands.tiles == 1) {
    sum.add<false>(x, memory, blocks);
  } else {
    T* other = memory + MixMemory<T>::kOther;
    for (int i = 0; i < a.bands.tiles; ++i) {
      const int c = block.band.start + i * kTileChannels;
      __syncthreads();  // all have done with what this overwrites
      load_matrix(memory, a.matrices + block.image * a.bands.channels * a.row_values, a.row_values,
                  a.bands, block.band, a.transposed ? block.channel : c,
                  a.transposed ? c : block.channel, a.transposed);
      const ChannelRows<T> others{rows.data + c - block.channel, rows.stride, block.band.end - c,
                                  rows.vector};
      load_tile<kTileTokens, kTileRow>(other, others, tile);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      sum.add<false>(other, memory, head_blocks(a.bands, block.band, c, block.channel));
    }
  }
  sum.store(product);
}

// The results of a thread's strip; near: its convolution, or null.
template <class T>
XATTN_DEVICE void store_mixed(const MixArgs& a, const StripBlock& block, const TokenTile& tile,
                              const StripItem& item, const T* x, const float* product,
                              const Strip* near) {
  T* out = static_cast<T*>(a.out) + block.image * a.tokens * a.out_stride;
  const int first = item.row * tile.columns + item.column;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (item.row >= tile.valid_rows || item.column + i >= tile.valid_columns) continue;
    const int at = (first + i) * kTileRow + 2 * item.pair;
    auto value = load_pair(product + at);
    value.v[0] *= a.scale;
    value.v[1] *= a.scale;
    if (near != nullptr) {
      const auto own = load_pair(x + at);
      value.v[0] += own.v[0] * (*near)[i][0];
      value.v[1] += own.v[1] * (*near)[i][1];
    }
    store_pair(out + tile.token(item.row, item.column + i) * a.out_stride,
               block.channel + 2 * item.pair, block.band, value, a.vector);
  }
}

template <class T>  // of float, fewer blocks find room in shared memory
__global__ __launch_bounds__(kStripThreads, kIsShort<T> ? 4 : 3) void mix(MixArgs a) {
  SHARED_DYNAMIC(T, memory);
  const StripPlan& plan = a.plan;
  const StripBlock block(plan, a.bands);
  const int channels = block.band.end - block.channel, c = block.channel;
  if (channels <= 0) return;  // a tile that the band does not reach
  T* const stages = memory + MixMemory<T>::kInput;
  const float* const product = reinterpret_cast<float*>(memory + MixMemory<T>::kProduct);
  const T* x_image = static_cast<const T*>(a.x) + block.image * a.x_stride[0] + c;
  const ChannelRows<T> rows{x_image, a.x_stride[1], channels, a.vector};
  uint32_t blocks = 0;
  if (a.bands.tiles == 1) {
    blocks = head_blocks(a.bands, block.band, c, c);
    load_matrix(memory, a.matrices + block.image * a.bands.channels * a.row_values, a.row_values,
                a.bands, block.band, c, c, a.transposed);
  }

  const auto load = [&](int stage, const TokenTile& tile) {
    load_tile<kTileTokens, kTileRow>(stages + stage * kTileValues, rows, tile);
  };
  const StripItem plain(channels, kBlockStrips, 1);
  walk_plain(plan, block.part, load, [&](const TokenTile& tile) {
    mix_product(a, block, tile, rows, stages, blocks, memory);
    __syncthreads();
    if (plain.active) store_mixed<T>(a, block, tile, plain, stages, product, nullptr);
  });
  if (plan.height == 0) return;

  const T* v_image = static_cast<const T*>(a.values) + block.image * a.value_stride[0] + c;
  const ChannelRows<T> image{v_image + plan.plain * a.value_stride[1], a.value_stride[1], channels,
                             a.vector};
  const StripWalk<T> walk(plan, image, block.part, memory + MixMemory<T>::ring(a.bands));
  const StripItem item(channels, plan.strips, plan.rows);
  const StripConvolution<T> convolution{walk, a.taps, item, c + 2 * item.pair};
  walk.run(load, [&](int stage, int y) {
    const TokenTile tile = walk.part.tile(plan, y);
    const T* x = stages + stage * kTileValues;
    mix_product(a, block, tile, rows, x, blocks, memory);
    __syncthreads();
    if (!item.active || item.row >= tile.valid_rows) return;
    Strip near;
    convolution.begin_with_bias(near);
    convolution.template add<false>(near, y);
    store_mixed(a, block, tile, item, x, product, &near);
  });
}

}  // namespace xattn::convrel_cuda
