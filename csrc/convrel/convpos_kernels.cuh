// Convolutional position encoding: image tokens plus their convolution, the others as they are; in
// the backward grad_out plus its transposed convolution.
#pragma once

#include "common/depthwise_strip.cuh"

namespace xattn::convpos_cuda {

struct EncodingArgs {
  const void* x;  // [batch, tokens, channels]
  int64_t stride[2];
  void* out;  // contiguous
  int64_t tokens;
  Bands bands;
  StripPlan plan;
  TapTable taps;
  bool vector;
};

// Grid: parts of an image x bands x images.
template <class T, bool kTransposed>
__global__ __launch_bounds__(kStripThreads, 4) void add_convolution(EncodingArgs a) {
  SHARED_DYNAMIC(T, memory);
  const StripPlan& plan = a.plan;
  const int block = static_cast<int>(blockIdx.x % plan.blocks());
  const int64_t unit = blockIdx.x / plan.blocks(), n = unit / a.bands.count;
  const Band band = a.bands.of(static_cast<int>(unit % a.bands.count));
  const int channels = band.end - band.start;
  const T* x = static_cast<const T*>(a.x) + n * a.stride[0] + band.start;
  const ChannelRows<T> rows{x, a.stride[1], channels, a.vector};
  T* out = static_cast<T*>(a.out) + n * a.tokens * a.bands.channels;

  const int64_t warps = kBlockStrips * plan.blocks();
  const int c = 2 * (threadIdx.x % 32);
  for (int64_t t = block * kBlockStrips + threadIdx.x / 32; t < plan.plain; t += warps) {
    if (c >= channels) continue;
    store_pair(out + t * a.bands.channels, band.start + c, band, load_pair(rows, t, c), a.vector);
  }

  const ChannelRows<T> image{rows.row(plan.plain), rows.stride, channels, a.vector};
  const StripWalk<T> walk(plan, image, block, memory);
  const StripItem item(channels, plan.strips, plan.rows);
  const int pair = band.start + 2 * item.pair;
  const StripConvolution<T> convolution{walk, a.taps, item, pair};
  const auto load_nothing = [](int, const TokenTile&) {};
  walk.run(load_nothing, [&](int, int y) {
    const TokenTile tile = walk.part.tile(plan, y);
    if (!item.active || item.row >= tile.valid_rows) return;
    Strip sum = {};
    if constexpr (!kTransposed) convolution.begin_with_bias(sum);
    convolution.template add<kTransposed>(sum, y);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      if (item.column + i >= tile.valid_columns) continue;
      const int64_t t = tile.token(item.row, item.column + i);
      auto value = load_pair(rows, t, 2 * item.pair);  // it was read a moment ago
      value.v[0] += sum[i][0];
      value.v[1] += sum[i][1];
      store_pair(out + t * a.bands.channels, pair, band, value, a.vector);
    }
  });
}

}  // namespace xattn::convpos_cuda
