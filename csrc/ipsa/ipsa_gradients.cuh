// Gradients that windows share: of the bias table and of the padding tokens. A block sums its own
// windows; these parts are added up afterwards, in a fixed order (sum_parts).
#pragma once

#include "ipsa_tiled.cuh"

namespace xattn::ipsa_cuda {

constexpr int kSumStride = kTile + 8;  // floats from a row of a tile of sums to the next

// A warp's rows of a tile [kTile][kSumStride] in shared memory.
template <int kN>
XATTN_DEVICE void put_sums(const float (&sums)[kN][4], float* tile) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = tile + (warp_id() * 16 + lane_row(half)) * kSumStride + n * 8 + lane_column();
      *reinterpret_cast<Pack<float, 2>*>(to) = {{sums[n][2 * half], sums[n][2 * half + 1]}};
    }
  }
}

// The sum of a bin over its pairs of a query and a key (query minus offset) within a tile.
template <class T>
XATTN_DEVICE float sum_of_bin(const Args<T>& a, int bin, const float* tile, int query_tile,
                              int key_tile) {
  const int dy = bin / (2 * a.window_w - 1) - (a.window_h - 1);
  const int dx = bin % (2 * a.window_w - 1) - (a.window_w - 1);
  const int first = query_tile * kTile;
  const int last = min(first + kTile, a.tokens()) - 1;
  float sum = 0;
  for (int y = max(max(dy, 0), first / a.window_w);
       y <= min(a.window_h - 1 + min(dy, 0), last / a.window_w); ++y) {
    for (int x = max(dx, 0); x <= a.window_w - 1 + min(dx, 0); ++x) {
      const int query = y * a.window_w + x - first;
      const int key = (y - dy) * a.window_w + x - dx - key_tile * kTile;
      const bool both = 0 <= query && query < kTile && 0 <= key && key < kTile;
      if (both) sum += tile[query * kSumStride + key];
    }
  }
  return sum;
}

// Adds a tile of sums to a head's bins of a part; a bin belongs to one thread. first: the part has
// not been written yet.
template <class T>
XATTN_DEVICE void add_bins(const Args<T>& a, int64_t part, int head, const float* tile,
                           int query_tile, int key_tile, bool first) {
  for (int bin = threadIdx.x; bin < a.bins(); bin += kThreads) {
    float& to = a.bias_parts[(part * a.bins() + bin) * a.heads + head];
    const float sum = sum_of_bin(a, bin, tile, query_tile, key_tile);
    to = first ? sum : to + sum;
  }
}

// The sums of the rows of k's and v's gradients that belong to padding tokens, one row for a warp.
// (A padding token's own output is cropped: its q has no gradient.)
template <int kD>
struct PadSums {
  float of[kThreads / 32][2][kD];

  XATTN_DEVICE void clear() {
    for (int i = lane_id(); i < 2 * kD; i += 32) of[warp_id()][i / kD][i % kD] = 0;
    __syncwarp();
  }

  // Rows `padding` of a warp's gradient [16, kD] of k (which = 0) or v (1), times a factor.
  XATTN_DEVICE void add(int which, const float (&c)[kD / 8][4], float factor,
                        const bool (&padding)[2]) {
    if (!__any_sync(kWholeWarp, padding[0] || padding[1])) return;
#pragma unroll
    for (int i = 0; i < kD / 4; ++i) {
      const float top = padding[0] ? c[i / 2][i % 2] : 0.0f;
      const float bottom = padding[1] ? c[i / 2][2 + i % 2] : 0.0f;
      const float sum = fold_lanes<4, 32>(top + bottom, SumOf{});
      const int d = i / 2 * 8 + lane_column() + i % 2;
      if (lane_row(0) == 0) of[warp_id()][which][d] += sum * factor;
    }
  }

  // Channels d0 .. d0 + kD - 1 of a head, as a part. All of the block's sums must be in.
  template <class T>
  XATTN_DEVICE void store(const Args<T>& a, int64_t part, int head, int d0) const {
    for (int i = threadIdx.x; i < 3 * kD; i += kThreads) {
      const int which = i / kD, d = i % kD;
      if (d0 + d >= a.head_dim) continue;
      float sum = 0;
      for (int warp = 0; which > 0 && warp < kThreads / 32; ++warp) sum += of[warp][which - 1][d];
      a.pad_parts[(part * 3 + which) * a.channels() + head * a.head_dim + d0 + d] = sum;
    }
  }
};

}  // namespace xattn::ipsa_cuda
