// Gradients of the kernels and biases of depthwise convolutions: a value for each tap and channel,
// the sum over the pixels of the gradient there times the value that the tap met.
//
// A block sums up a share of the images' parts, each thread a pair of channels: all of its taps in
// registers where windows are small, some taps of one kernel row where they are not. Shares are in
// the layout of the weights and are added in their order.
#pragma once

#include "depthwise_strip.cuh"

namespace xattn {

struct TapGradientArgs {
  const void *grad, *values;  // [batch, tokens, ...] at channel 0; of the outputs, of the inputs
  int64_t grad_stride[2], value_stride[2];
  float* weight_shares;  // [shares][weights]
  float* bias_shares;    // [shares][channels], or null
  int64_t batch, weights;
  int shares;
  Bands bands;
  StripPlan plan;
  TapTable taps;
  bool vector;
};

constexpr int kLargestRing = 2 * kRingRadius + 1;
constexpr int kGradientTile = kTileTokens * kTileChannels;

// Bytes of shared memory of a block: two stages of gradients and the ring, then the sums.
inline size_t tap_gradient_shared(const StripPlan& plan, int largest, size_t value_bytes) {
  const size_t values = (2 * kGradientTile + plan.ring_values()) * value_bytes;
  return std::max(values, (largest * largest + 1) * kTileChannels * sizeof(float));
}

template <class T>
XATTN_DEVICE ChannelRows<T> image_rows(const void* data, const int64_t* stride, int64_t image,
                                       int64_t first, const Band& band, bool vector) {
  const T* from = static_cast<const T*>(data) + image * stride[0] + first * stride[1] + band.start;
  return {from, stride[1], band.end - band.start, vector};
}

// The sums of a thread: of the taps of its window, in rows of kLargestRing, and of the gradient.
struct TapSums {
  float tap[kLargestRing * kLargestRing][2] = {};
  float bias[2] = {};

  // += a strip of gradients times the rows around it; column: of the ring, the first that any
  // window reaches.
  template <int kWindow, class T>
  XATTN_DEVICE void add(const Strip& grad, const Ring<T>& ring, int y, int column, int pair) {
    constexpr int kWide = kStrip + kWindow - 1, kReach = kWindow / 2;
    int slot = ring.slot(y - kReach);
#pragma unroll
    for (int dy = 0; dy < kWindow; ++dy, slot = ring.next(slot)) {
      const T* row = ring.at(slot, column - kReach) + 2 * pair;
      Pack<float, 2> near[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) near[i] = load_pair(row + i * kTileChannels);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
#pragma unroll
        for (int dx = 0; dx < kWindow; ++dx) {
          tap[dy * kWindow + dx][0] += grad[i][0] * near[i + dx].v[0];
          tap[dy * kWindow + dx][1] += grad[i][1] * near[i + dx].v[1];
        }
      }
    }
  }

  // To the sums of the block, [largest^2 + 1][kTileChannels], the first strip's or added.
  template <int kWindow>
  XATTN_DEVICE void store(float* sums, int largest, int pair, bool first) const {
    const int corner = largest * largest / 2 - kWindow / 2 * (largest + 1);
#pragma unroll
    for (int i = 0; i < kWindow * kWindow; ++i) {
      const int at = corner + i / kWindow * largest + i % kWindow;
      put(sums + at * kTileChannels + 2 * pair, tap[i], first);
    }
    put(sums + largest * largest * kTileChannels + 2 * pair, bias, first);
  }

 private:
  XATTN_DEVICE static void put(float* to, const float (&value)[2], bool first) {
    to[0] = first ? value[0] : to[0] + value[0];
    to[1] = first ? value[1] : to[1] + value[1];
  }
};

// A block's share, from its sums [largest^2 + 1][kTileChannels].
XATTN_DEVICE void write_share(const TapGradientArgs& a, const Band& band, int share,
                              const float* sums) {
  const int largest = a.taps.largest;
  for (int i = threadIdx.x; i < (largest * largest + 1) * kTileChannels; i += kStripThreads) {
    const int tap = i / kTileChannels, c = band.start + i % kTileChannels;
    if (c < band.low || c >= band.high) continue;
    if (tap == largest * largest) {
      if (a.bias_shares != nullptr) {
        a.bias_shares[static_cast<int64_t>(share) * a.bands.channels + c] = sums[i];
      }
      continue;
    }
    const int window = a.taps.windows[c], edge = largest / 2 - window / 2;
    const int dy = tap / largest - edge, dx = tap % largest - edge;
    if (dy < 0 || dy >= window || dx < 0 || dx >= window) continue;
    a.weight_shares[share * a.weights + a.taps.places[c] + dy * window + dx] = sums[i];
  }
}

// Grid: bands x shares, each of which takes every shares-th part of an image.
template <class T>
__global__ __launch_bounds__(kStripThreads, 3) void sum_tap_gradients(TapGradientArgs a) {
  SHARED_DYNAMIC(T, memory);
  const StripPlan& plan = a.plan;
  const Band band = a.bands.of(blockIdx.x % a.bands.count);
  const int share = blockIdx.x / a.bands.count;
  const StripItem item(band.end - band.start, plan.strips, plan.rows);
  const int window = item.active ? a.taps.window(band.start + 2 * item.pair) : 0;
  const int64_t units = a.batch * plan.blocks();
  TapSums sums;
  for (int64_t unit = share; unit < units; unit += a.shares) {
    const int64_t n = unit / plan.blocks();
    const auto grad = image_rows<T>(a.grad, a.grad_stride, n, 0, band, a.vector);
    const auto image = image_rows<T>(a.values, a.value_stride, n, plan.plain, band, a.vector);
    const StripWalk<T> walk(plan, image, static_cast<int>(unit % plan.blocks()),
                            memory + 2 * kGradientTile);
    const auto load = [&](int stage, const TokenTile& tile) {
      load_tile<kTileTokens, kTileChannels>(memory + stage * kGradientTile, grad, tile);
    };
    walk.run(load, [&](int stage, int y) {
      if (!item.active || y + item.row >= walk.part.y_end) return;
      const T* tile = memory + stage * kGradientTile + 2 * item.pair +
                      (item.row * plan.tile_columns() + item.column) * kTileChannels;
      Strip grads;
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const auto pair = load_pair(tile + i * kTileChannels);
        sums.bias[0] += grads[i][0] = pair.v[0];
        sums.bias[1] += grads[i][1] = pair.v[1];
      }
      const int column = item.column + plan.radius;
      if (window <= 3) {
        sums.add<3>(grads, walk.ring, y + item.row, column, item.pair);
      } else if (window <= 5) {
        sums.add<5>(grads, walk.ring, y + item.row, column, item.pair);
      } else {
        sums.add<7>(grads, walk.ring, y + item.row, column, item.pair);
      }
    });
  }

  float* const total = reinterpret_cast<float*>(memory);
  for (int strip = 0; strip < plan.strips * plan.rows; ++strip) {  // one after another: in order
    __syncthreads();
    if (!item.active || item.index != strip) continue;
    if (window <= 3) {
      sums.store<3>(total, a.taps.largest, item.pair, strip == 0);
    } else if (window <= 5) {
      sums.store<5>(total, a.taps.largest, item.pair, strip == 0);
    } else {
      sums.store<7>(total, a.taps.largest, item.pair, strip == 0);
    }
  }
  __syncthreads();
  write_share(a, band, share, total);
}

constexpr int kTapRun = 8;  // taps of a kernel row that a thread takes where windows are large

// The same for any window. Grid: runs of taps x rows of the largest kernel x bands x shares, each
// of which takes every shares-th row of an image; a warp every kBlockStrips-th pixel of it.
template <class T>
__global__ __launch_bounds__(kStripThreads) void sum_tap_gradients_of_any(TapGradientArgs a) {
  SHARED(float, total, [kTapRun + 1][kTileChannels]);
  const StripPlan& plan = a.plan;
  const int largest = a.taps.largest, runs = (largest + kTapRun - 1) / kTapRun;
  int at = blockIdx.x;
  const int first = at % runs * kTapRun, dy = (at /= runs) % largest;
  const Band band = a.bands.of((at /= largest) % a.bands.count);
  const int share = at / a.bands.count, channels = band.end - band.start;
  const int c = 2 * (threadIdx.x % 32), warp = threadIdx.x / 32;
  float sums[kTapRun + 1][2] = {};  // the last is the bias's
  for (int64_t unit = share; c < channels && unit < a.batch * plan.height; unit += a.shares) {
    const int64_t n = unit / plan.height;
    const int y = static_cast<int>(unit % plan.height), near_y = y + dy - largest / 2;
    const auto grad = image_rows<T>(a.grad, a.grad_stride, n, plan.plain, band, a.vector);
    const auto image = image_rows<T>(a.values, a.value_stride, n, plan.plain, band, a.vector);
    for (int x = warp; x < plan.width; x += kBlockStrips) {
      const auto g = load_pair(grad, static_cast<int64_t>(y) * plan.width + x, c);
      sums[kTapRun][0] += g.v[0];
      sums[kTapRun][1] += g.v[1];
      if (near_y < 0 || near_y >= plan.height) continue;
#pragma unroll
      for (int i = 0; i < kTapRun; ++i) {
        const int near_x = x + first + i - largest / 2;
        if (first + i >= largest || near_x < 0 || near_x >= plan.width) continue;
        const auto v = load_pair(image, static_cast<int64_t>(near_y) * plan.width + near_x, c);
        sums[i][0] += g.v[0] * v.v[0];
        sums[i][1] += g.v[1] * v.v[1];
      }
    }
  }

  for (int turn = 0; turn < kBlockStrips; ++turn) {  // one warp after another: in order
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int i = 0; i <= kTapRun; ++i) {
      for (int j = 0; j < 2; ++j) {
        total[i][c + j] = turn == 0 ? sums[i][j] : total[i][c + j] + sums[i][j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (kTapRun + 1) * kTileChannels; i += kStripThreads) {
    const int tap = i / kTileChannels, own = band.start + i % kTileChannels;
    if (own < band.low || own >= band.high) continue;
    const float sum = total[tap][i % kTileChannels];
    if (tap == kTapRun) {
      if (dy != 0 || first != 0 || a.bias_shares == nullptr) continue;
      a.bias_shares[static_cast<int64_t>(share) * a.bands.channels + own] = sum;
      continue;
    }
    const int window = a.taps.windows[own], edge = largest / 2 - window / 2;
    const int row = dy - edge, column = first + tap - edge;
    if (row < 0 || row >= window || column < 0 || column >= window) continue;
    a.weight_shares[share * a.weights + a.taps.places[own] + row * window + column] = sum;
  }
}

}  // namespace xattn
