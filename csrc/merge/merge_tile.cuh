// What the CUDA kernels of token merge and enhancement share: their arguments, the tiles that an
// image is cut into, and the pixels and weights of a group of channels.
//
// A block takes a tile of an image and kGroup channels, 128 bytes of a token; lanes are channels,
// so what a warp does at a pixel is the same for all lanes. There are two ways through every
// kernel:
//   kFast: the pixels that the windows of a tile reach, and the weights, lie in shared memory;
//   else: any number of channels and any window; everything is read where it lies.
#pragma once

#include "common/numbers.cuh"
#include "common/ptx.cuh"

namespace xattn::merge_cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// A depthwise convolution: weight [channels, 1, window, window]; no window where there is none.
struct Convolution {
  const void* weight;
  int window;
  XATTN_DEVICE int reach() const { return window / 2; }
  XATTN_DEVICE int taps() const { return window * window; }
};

// Tokens of an image in rows of `width`, behind `prefix` others.
struct Map {
  const void* data;
  int64_t stride[2];  // of images and of tokens, in elements
  int height, width, prefix;
};

// One call; see MergeArgs (merge.h). Of outputs, or gradients of them: digests has no data without
// a merge, enhanced none where its gradient is not there.
struct Args {
  int64_t batch;
  int channels, groups, stride;
  int tile_h, tile_w, tiles_x, tiles;  // tiles of an image
  int pixels, digest_pixels;           // room for those that a tile needs, in shared memory
  Convolution merge, enhance;
  const void* bias;
  Map x, digests, enhanced;
  void *to_digests, *to_tokens;  // dense results
  int shares;                    // of the gradients of weights, each over some images and tiles:
  float *merge_parts, *enhance_parts, *bias_parts;  // [shares, channels, taps], or null
};

template <class T>
constexpr int kPerLane = 4 / sizeof(T);
template <class T>
constexpr int kGroup = 32 * kPerLane<T>;

XATTN_DEVICE int warp_id() { return threadIdx.x / 32; }
XATTN_DEVICE int lane_id() { return threadIdx.x % 32; }
XATTN_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Values of a lane's channels at one place.
template <class T>
struct Values {
  float v[kPerLane<T>];
  XATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) v[i] = 0;
  }
  XATTN_DEVICE void add(const Values& x) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) v[i] += x.v[i];
  }
  XATTN_DEVICE void add_product(const Values& x, const Values& y) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) v[i] = fmaf(x.v[i], y.v[i], v[i]);
  }
};

// The channels of this lane.
template <class T, bool kFast>
struct Lane {
  int first, channels;
  XATTN_DEVICE Lane(const Args& a, int group)
      : first(group * kGroup<T> + lane_id() * kPerLane<T>), channels(a.channels) {}
  XATTN_DEVICE bool has(int i) const { return first + i < channels; }

  // From and to rows of all channels; fast: all channels of a lane are there, or none.
  XATTN_DEVICE Values<T> load(const T* row) const {
    Values<T> x;
    if constexpr (kFast) {
      Pack<T, kPerLane<T>> pack{};
      if (has(0)) pack = *reinterpret_cast<const Pack<T, kPerLane<T>>*>(row + first);
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) x.v[i] = to_float(pack.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) x.v[i] = has(i) ? to_float(row[first + i]) : 0;
    }
    return x;
  }
  XATTN_DEVICE void store(T* row, const Values<T>& x) const {
    if constexpr (kFast) {
      Pack<T, kPerLane<T>> pack;
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) pack.v[i] = from_float<T>(x.v[i]);
      if (has(0)) *reinterpret_cast<Pack<T, kPerLane<T>>*>(row + first) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) {
        if (has(i)) row[first + i] = from_float<T>(x.v[i]);
      }
    }
  }
};

// Rows [top, bottom) and columns [left, right) of a map.
struct Area {
  int top, bottom, left, right;
  XATTN_DEVICE int width() const { return right - left; }
  XATTN_DEVICE int size() const { return (bottom - top) * (right - left); }
  // With `reach` more on every side, as far as the map goes.
  XATTN_DEVICE Area grown(int reach, const Map& map) const {
    return {max(top - reach, 0), min(bottom + reach, map.height), max(left - reach, 0),
            min(right + reach, map.width)};
  }
};

XATTN_DEVICE Area tile_area(const Args& a, int tile) {
  const int top = tile / a.tiles_x * a.tile_h, left = tile % a.tiles_x * a.tile_w;
  return {top, min(top + a.tile_h, a.x.height), left, min(left + a.tile_w, a.x.width)};
}
// The digests whose windows stand in an area.
XATTN_DEVICE Area digests_in(const Area& area, int stride) {
  return {ceil_div(area.top, stride), ceil_div(area.bottom, stride), ceil_div(area.left, stride),
          ceil_div(area.right, stride)};
}
// The digests whose windows reach into an area.
XATTN_DEVICE Area digests_around(const Area& area, int stride, int reach, const Map& digests) {
  const auto first = [&](int at) { return at > reach ? ceil_div(at - reach, stride) : 0; };
  const auto end = [&](int at, int most) { return min((at - 1 + reach) / stride + 1, most); };
  return {first(area.top), end(area.bottom, digests.height), first(area.left),
          end(area.right, digests.width)};
}

// Pixels of one image of a map: fast, those of an area, in shared memory.
template <class T, bool kFast>
struct Pixels {
  const Lane<T, kFast> lane;
  const T* image;
  int64_t stride;
  int width;
  T* slab;
  Area area;

  XATTN_DEVICE Pixels(const Lane<T, kFast>& lane, const Map& map, int64_t index, T* slab)
      : lane(lane),
        image(static_cast<const T*>(map.data) + index * map.stride[0] + map.prefix * map.stride[1]),
        stride(map.stride[1]),
        width(map.width),
        slab(slab) {}

  // In the background; `group`: the first channel of the block.
  XATTN_DEVICE void load(const Area& wanted, int group) {
    area = wanted;
    if constexpr (kFast) {
      constexpr int kPiece = 16 / sizeof(T), kPieces = kGroup<T> / kPiece;
      const int columns = area.width();
      for (int i = threadIdx.x; i < area.size() * kPieces; i += kThreads) {
        const int pixel = i / kPieces, channel = i % kPieces * kPiece;
        const int y = area.top + pixel / columns, x = area.left + pixel % columns;
        const bool there = group + channel < lane.channels;
        const T* from = image + (static_cast<int64_t>(y) * width + x) * stride + group;
        ptx::cp_async<16>(slab + pixel * kGroup<T> + channel, there ? from + channel : from, there);
      }
    }
  }
  XATTN_DEVICE Values<T> at(int y, int x) const {
    if constexpr (kFast) {
      const int pixel = (y - area.top) * area.width() + x - area.left;
      const auto pack = *reinterpret_cast<const Pack<T, kPerLane<T>>*>(slab + pixel * kGroup<T> +
                                                                       lane_id() * kPerLane<T>);
      Values<T> values;
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) values.v[i] = to_float(pack.v[i]);
      return values;
    } else {
      return direct(y, x);
    }
  }
  // From where it lies.
  XATTN_DEVICE Values<T> direct(int y, int x) const {
    return lane.load(image + (static_cast<int64_t>(y) * width + x) * stride);
  }
};

// Weights of a convolution: fast, in shared memory [taps][kTapStride].
template <class T, bool kFast>
struct Taps {
  static constexpr int kTapStride = kGroup<T> + kPerLane<T>;  // taps of a channel in many banks
  const Lane<T, kFast> lane;
  const T* weight;
  float* shared;
  int window, reach;

  XATTN_DEVICE Taps(const Lane<T, kFast>& lane, const Convolution& c, float* shared)
      : lane(lane),
        weight(static_cast<const T*>(c.weight)),
        shared(shared),
        window(c.window),
        reach(c.reach()) {}

  XATTN_DEVICE void load(int group) const {
    if constexpr (kFast) {
      const int taps = window * window, count = min(kGroup<T>, lane.channels - group) * taps;
      for (int i = threadIdx.x; i < kGroup<T> * taps; i += kThreads) {
        shared[i % taps * kTapStride + i / taps] =
            i < count ? to_float(weight[static_cast<int64_t>(group) * taps + i]) : 0;
      }
    }
  }
  XATTN_DEVICE Values<T> at(int tap) const {
    Values<T> x;
    if constexpr (kFast) {
      const auto pack = *reinterpret_cast<const Pack<float, kPerLane<T>>*>(
          shared + tap * kTapStride + lane_id() * kPerLane<T>);
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) x.v[i] = pack.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) {
        const int64_t c = lane.first + i;
        x.v[i] = lane.has(i) ? to_float(weight[c * window * window + tap]) : 0;
      }
    }
    return x;
  }
};

// Floats of the weights of a convolution in shared memory.
template <class T>
size_t tap_floats(int window) {
  return static_cast<size_t>(window) * window * Taps<T, true>::kTapStride;
}

// One value of a convolution: the window around (y, x) of a map of this height and width.
template <bool kFlipped, class P, class W, class V>
XATTN_DEVICE void convolve(V& sum, const P& pixels, const W& taps, int y, int x, const Map& map) {
  const int first_y = max(0, taps.reach - y), end_y = min(taps.window, map.height + taps.reach - y);
  const int first_x = max(0, taps.reach - x), end_x = min(taps.window, map.width + taps.reach - x);
  const int last = taps.window * taps.window - 1;
  for (int ky = first_y; ky < end_y; ++ky) {
    for (int kx = first_x; kx < end_x; ++kx) {
      const int tap = ky * taps.window + kx;
      sum.add_product(taps.at(kFlipped ? last - tap : tap),
                      pixels.at(y + ky - taps.reach, x + kx - taps.reach));
    }
  }
}

// Values of a convolution of stride 1 at columns [left, right) of row y: put(x, value), each begun
// with start(x). A window of 3 goes through registers: every pixel is read once a row.
template <bool kFlipped, class T, bool kFast, class Start, class Put>
XATTN_DEVICE void convolve_row(const Pixels<T, kFast>& pixels, const Taps<T, kFast>& taps, int y,
                               int left, int right, const Map& map, Start start, Put put) {
  if (taps.window != 3) {
    for (int x = left; x < right; ++x) {
      Values<T> sum = start(x);
      convolve<kFlipped>(sum, pixels, taps, y, x, map);
      put(x, sum);
    }
    return;
  }
  Values<T> weight[3][3];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) weight[tap / 3][tap % 3] = taps.at(kFlipped ? 8 - tap : tap);
  // Of the columns x - 1, x and x + 1, while column x of the pixels passes.
  Values<T> before, here, after;
  before.clear();
  here.clear();
  for (int x = left - 1; x <= right; ++x) {
    after.clear();
    if (x + 1 < right) after = start(x + 1);
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
      if (x < 0 || x >= map.width || y + ky < 1 || y + ky > map.height) continue;
      const Values<T> pixel = pixels.at(y + ky - 1, x);
      before.add_product(weight[ky][2], pixel);
      here.add_product(weight[ky][1], pixel);
      after.add_product(weight[ky][0], pixel);
    }
    if (x > left) put(x - 1, before);
    before = here;
    here = after;
  }
}

// Copies the tokens before the grid, or clears them.
template <class T, bool kFast>
XATTN_DEVICE void pass_prefix(const Lane<T, kFast>& lane, const Map& from, int64_t image, T* to,
                              int64_t channels) {
  for (int t = warp_id(); t < from.prefix; t += kWarps) {
    Values<T> x;
    x.clear();
    if (from.data != nullptr) {
      x = lane.load(static_cast<const T*>(from.data) + image * from.stride[0] + t * from.stride[1]);
    }
    lane.store(to + t * channels, x);
  }
}

}  // namespace xattn::merge_cuda
