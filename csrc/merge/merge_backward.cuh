// Backward of token merge and enhancement. The gradient of x is a gather: the enhancement over its
// gradient with the taps flipped, plus what each pixel takes of the few windows of the merge that
// reach it. The gradients of the weights are sums over images and tiles, in shares that blocks add
// up in a fixed order.
#pragma once

#include "merge_forward.cuh"

namespace xattn::merge_cuda {

// What pixel (y, x) gets of the digests.
template <class T, bool kFast>
XATTN_DEVICE Values<T> gather_digests(const Pixels<T, kFast>& digests, const Taps<T, kFast>& merge,
                                      int y, int x, const Args& a) {
  Values<T> sum;
  sum.clear();
  const Area reaching = digests_around({y, y + 1, x, x + 1}, a.stride, merge.reach, a.digests);
  for (int my = reaching.top; my < reaching.bottom; ++my) {
    const int ky = y + merge.reach - my * a.stride;
    for (int mx = reaching.left; mx < reaching.right; ++mx) {
      const int kx = x + merge.reach - mx * a.stride;
      sum.add_product(merge.at(ky * merge.window + kx), digests.at(my, mx));
    }
  }
  return sum;
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 3) merge_input_gradient(const Args a) {
  SHARED_DYNAMIC(T, slab);
  const Block block(a);
  const int group = block.group * kGroup<T>;
  const Lane<T, kFast> lane(a, block.group);
  const Area area = tile_area(a, block.tile);
  const bool merging = a.digests.data != nullptr, enhancing = a.enhanced.data != nullptr;
  float* const weights = behind(slab, a.pixels + a.digest_pixels);
  const Taps<T, kFast> enhance(lane, a.enhance, weights);
  const Taps<T, kFast> merge(lane, a.merge, weights + a.enhance.taps() * Taps<T, true>::kTapStride);
  Pixels<T, kFast> grads(lane, a.enhanced, enhancing ? block.image : 0, slab);
  Pixels<T, kFast> digests(lane, a.digests, merging ? block.image : 0,
                           slab + static_cast<int64_t>(a.pixels) * kGroup<T>);
  if (enhancing) {
    grads.load(area.grown(enhance.reach, a.enhanced), group);
    enhance.load(group);
  }
  if (merging) {
    digests.load(digests_around(area, a.stride, merge.reach, a.digests), group);
    merge.load(group);
  }
  ptx::cp_async_commit();
  const int64_t tokens = a.x.prefix + static_cast<int64_t>(a.x.height) * a.x.width;
  T* const to = static_cast<T*>(a.to_tokens) + block.image * tokens * a.channels;
  if (block.tile == 0) pass_prefix(lane, a.enhanced, block.image, to, a.channels);
  ptx::cp_async_wait<0>();
  __syncthreads();

  for (int y = area.top + warp_id(); y < area.bottom; y += kWarps) {
    T* const row = to + (a.x.prefix + static_cast<int64_t>(y) * a.x.width) * a.channels;
    const auto start = [&](int x) {
      if (merging) return gather_digests(digests, merge, y, x, a);
      Values<T> zero;
      zero.clear();
      return zero;
    };
    const auto put = [&](int x, const Values<T>& value) {
      lane.store(row + static_cast<int64_t>(x) * a.channels, value);
    };
    if (enhancing) {
      convolve_row<true>(grads, enhance, y, area.left, area.right, a.enhanced, start, put);
    } else {
      for (int x = area.left; x < area.right; ++x) put(x, start(x));
    }
  }
}

// Sums of one convolution's weight gradient over what a block takes: fast, in shared memory and
// written at the end; else where they are to be.
template <class T, bool kFast>
struct WeightSums {
  static constexpr int kTapStride = Taps<T, true>::kTapStride;
  const Lane<T, kFast> lane;
  float *shared, *share;  // share: [channels][taps] of this block's share
  int taps;

  XATTN_DEVICE WeightSums(const Lane<T, kFast>& lane, float* shared, float* parts, int64_t index,
                          int taps)
      : lane(lane),
        shared(shared),
        share(parts != nullptr ? parts + index * lane.channels * taps : nullptr),
        taps(taps) {}

  XATTN_DEVICE int count(int group) const { return min(kGroup<T>, lane.channels - group) * taps; }
  XATTN_DEVICE void clear(int group) const {
    const int floats = kFast ? taps * kTapStride : count(group);
    float* const first = kFast ? shared : share + static_cast<int64_t>(group) * taps;
    for (int i = threadIdx.x; i < floats; i += kThreads) first[i] = 0;
  }
  XATTN_DEVICE void add(int tap, const Values<T>& x) const {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) {
      if constexpr (kFast) {
        shared[tap * kTapStride + lane_id() * kPerLane<T> + i] += x.v[i];
      } else if (lane.has(i)) {
        share[static_cast<int64_t>(lane.first + i) * taps + tap] += x.v[i];
      }
    }
  }
  XATTN_DEVICE void write(int group) const {
    if constexpr (kFast) {
      for (int i = threadIdx.x; i < count(group); i += kThreads) {
        share[static_cast<int64_t>(group) * taps + i] = shared[i % taps * kTapStride + i / taps];
      }
    }
  }
};

// The gradient of a convolution's weight from the outputs of an area, some taps of a row a warp.
template <class T, bool kFast>
XATTN_DEVICE void add_tap_rows(const WeightSums<T, kFast>& sums, const Pixels<T, kFast>& x,
                               const Pixels<T, kFast>& grads, const Convolution& c,
                               const Area& outputs, int stride, const Map& map) {
  constexpr int kTaps = 7;
  const int pieces = ceil_div(c.window, kTaps);
  for (int task = warp_id(); task < c.window * pieces; task += kWarps) {
    const int ky = task / pieces, first = task % pieces * kTaps;
    Values<T> sum[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) sum[k].clear();
    for (int oy = outputs.top; oy < outputs.bottom; ++oy) {
      const int y = oy * stride + ky - c.reach();
      if (y < 0 || y >= map.height) continue;
      for (int ox = outputs.left; ox < outputs.right; ++ox) {
        const Values<T> grad = grads.direct(oy, ox);
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          const int column = ox * stride + first + k - c.reach();
          if (first + k >= c.window || column < 0 || column >= map.width) continue;
          sum[k].add_product(grad, x.at(y, column));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      if (first + k < c.window) sums.add(ky * c.window + first + k, sum[k]);
    }
  }
}

// The gradients of a window of 3 with stride 1, and of the bias: every warp takes rows of its own
// and keeps its sums in registers.
constexpr int kRowSums = 10;  // 9 taps and the bias, of which every warp has its own
constexpr int64_t kRowSumBytes = int64_t{kWarps} * kRowSums * kGroup<__half> * sizeof(float);

template <class T, bool kFast>
struct RowSums {
  Values<T> tap[3][3], bias;

  XATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 9; ++i) tap[i / 3][i % 3].clear();
    bias.clear();
  }
  XATTN_DEVICE void add_row(const Pixels<T, kFast>& x, const Pixels<T, kFast>& grads, int y,
                            int left, int right, const Map& map) {
    Values<T> before, here, after;  // gradients at column - 1, column and column + 1
    before.clear();
    here.clear();
    for (int column = left - 1; column <= right; ++column) {
      after.clear();
      if (column + 1 < right) after = grads.direct(y, column + 1);
      bias.add(after);
#pragma unroll
      for (int ky = 0; ky < 3; ++ky) {
        if (column < 0 || column >= map.width || y + ky < 1 || y + ky > map.height) continue;
        const Values<T> pixel = x.at(y + ky - 1, column);
        tap[ky][2].add_product(pixel, before);
        tap[ky][1].add_product(pixel, here);
        tap[ky][0].add_product(pixel, after);
      }
      before = here;
      here = after;
    }
  }
  // Over the warps, in order, through shared memory [kWarps][kRowSums][kGroup]. Where other windows
  // have sums of their own, the bias alone.
  XATTN_DEVICE void write(float* shared, int64_t share, int group, const Args& a) const {
#pragma unroll
    for (int i = 0; i < kRowSums; ++i) {
      const Values<T>& x = i < 9 ? tap[i / 3][i % 3] : bias;
#pragma unroll
      for (int j = 0; j < kPerLane<T>; ++j) {
        shared[(warp_id() * kRowSums + i) * kGroup<T> + lane_id() * kPerLane<T> + j] = x.v[j];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kGroup<T> * kRowSums; i += kThreads) {
      const int channel = i / kRowSums, which = i % kRowSums;
      if (group + channel >= a.channels) continue;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared[(w * kRowSums + which) * kGroup<T> + channel];
      const int64_t at = share * a.channels + group + channel;
      if (which < 9 && a.enhance.window == 3) {
        a.enhance_parts[at * 9 + which] = sum;
      } else if (which == 9 && a.bias_parts != nullptr) {
        a.bias_parts[at] = sum;
      }
    }
  }
};

// This warp's share of the sum of an area's gradients.
template <class T, bool kFast>
XATTN_DEVICE Values<T> sum_of_area(const Pixels<T, kFast>& grads, const Area& area) {
  Values<T> sum;
  sum.clear();
  for (int y = area.top + warp_id(); y < area.bottom; y += kWarps) {
    for (int x = area.left; x < area.right; ++x) sum.add(grads.direct(y, x));
  }
  return sum;
}

// Grid: groups of channels x shares of images and their tiles.
template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) merge_weight_gradients(const Args a) {
  SHARED_DYNAMIC(T, slab);
  const int64_t share = blockIdx.x / a.groups;
  const int index = blockIdx.x % a.groups, group = index * kGroup<T>;
  const Lane<T, kFast> lane(a, index);
  const bool merging = a.merge_parts != nullptr, enhancing = a.enhance_parts != nullptr;
  const bool by_rows = a.enhance.window == 3;
  float* const sums = behind(slab, a.pixels);
  const WeightSums<T, kFast> merge(lane, sums, a.merge_parts, share, a.merge.taps());
  const WeightSums<T, kFast> enhance(lane, sums + a.merge.taps() * Taps<T, true>::kTapStride,
                                     a.enhance_parts, share, a.enhance.taps());
  if (merging) merge.clear(group);
  if (enhancing && !by_rows) enhance.clear(group);
  RowSums<T, kFast> row_sums;
  row_sums.clear();
  const int reach = max(merging ? a.merge.reach() : 0, enhancing ? a.enhance.reach() : 0);
  const int64_t items = a.batch * a.tiles;
  for (int64_t item = items * share / a.shares; item < items * (share + 1) / a.shares; ++item) {
    const int64_t image = item / a.tiles;
    const Area area = tile_area(a, item % a.tiles);
    Pixels<T, kFast> x(lane, a.x, image, slab);
    __syncthreads();
    x.load(area.grown(reach, a.x), group);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (merging) {
      const Pixels<T, kFast> grads(lane, a.digests, image, nullptr);
      add_tap_rows(merge, x, grads, a.merge, digests_in(area, a.stride), a.stride, a.x);
    }
    if (!enhancing) continue;
    const Pixels<T, kFast> grads(lane, a.enhanced, image, nullptr);
    if (by_rows) {
      for (int y = area.top + warp_id(); y < area.bottom; y += kWarps) {
        row_sums.add_row(x, grads, y, area.left, area.right, a.x);
      }
    } else {
      add_tap_rows(enhance, x, grads, a.enhance, area, 1, a.x);
      row_sums.bias.add(sum_of_area(grads, area));
    }
  }
  __syncthreads();
  if (merging) merge.write(group);
  if (!enhancing) return;
  if (!by_rows) enhance.write(group);
  row_sums.write(reinterpret_cast<float*>(slab), share, group, a);
}

}  // namespace xattn::merge_cuda
