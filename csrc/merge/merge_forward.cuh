// Forward of token merge and enhancement: the pixels of a tile, once in shared memory, serve both
// convolutions.
#pragma once

#include "merge_tile.cuh"

namespace xattn::merge_cuda {

// What a block works on: groups of channels fastest, then tiles, then images.
struct Block {
  int64_t image;
  int group, tile;
  XATTN_DEVICE explicit Block(const Args& a)
      : image(blockIdx.x / (static_cast<unsigned>(a.groups) * a.tiles)),
        group(blockIdx.x % a.groups),
        tile(blockIdx.x / a.groups % a.tiles) {}
};

// Floats of the weights behind the pixels in shared memory.
template <class T>
XATTN_DEVICE float* behind(T* slab, int pixels) {
  return reinterpret_cast<float*>(slab + static_cast<int64_t>(pixels) * kGroup<T>);
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 3) merge_forward(const Args a) {
  SHARED_DYNAMIC(T, slab);
  const Block block(a);
  const int group = block.group * kGroup<T>;
  const Lane<T, kFast> lane(a, block.group);
  const Area area = tile_area(a, block.tile);
  float* const weights = behind(slab, a.pixels);
  const Taps<T, kFast> enhance(lane, a.enhance, weights);
  const Taps<T, kFast> merge(lane, a.merge, weights + a.enhance.taps() * Taps<T, true>::kTapStride);
  Pixels<T, kFast> x(lane, a.x, block.image, slab);
  x.load(area.grown(max(merge.reach, enhance.reach), a.x), group);
  ptx::cp_async_commit();
  enhance.load(group);
  merge.load(group);
  const int64_t tokens = a.x.prefix + static_cast<int64_t>(a.x.height) * a.x.width;
  T* const enhanced = static_cast<T*>(a.to_tokens) + block.image * tokens * a.channels;
  if (block.tile == 0) pass_prefix(lane, a.x, block.image, enhanced, a.channels);
  Values<T> bias;
  bias.clear();
  if (a.bias != nullptr) {  // of any alignment
    bias = Lane<T, false>(a, block.group).load(static_cast<const T*>(a.bias));
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // A warp takes a row of tokens or one digest.
  const Area digests = a.merge.window > 0 ? digests_in(area, a.stride) : Area{0, 0, 0, 0};
  const int rows = area.bottom - area.top;
  for (int task = warp_id(); task < rows + digests.size(); task += kWarps) {
    if (task < rows) {
      const int y = area.top + task;
      T* const to = enhanced + (a.x.prefix + static_cast<int64_t>(y) * a.x.width) * a.channels;
      convolve_row<false>(
          x, enhance, y, area.left, area.right, a.x, [&](int) { return bias; },
          [&](int column, const Values<T>& value) {
            lane.store(to + static_cast<int64_t>(column) * a.channels, value);
          });
    } else {
      const int index = task - rows;
      const int y = digests.top + index / digests.width();
      const int column = digests.left + index % digests.width();
      Values<T> sum;
      sum.clear();
      convolve<false>(sum, x, merge, y * a.stride, column * a.stride, a.x);
      const int64_t digest = (block.image * a.digests.height + y) * a.digests.width + column;
      lane.store(static_cast<T*>(a.to_digests) + digest * a.channels, sum);
    }
  }
}

}  // namespace xattn::merge_cuda
