// The kernels of depthwise convolutions as CUDA kernels read them: along the channels.
//
// Groups of channels have square windows of their own. All stand in the middle of the largest, with
// zeros around, a row of channels for each tap and a last row for the biases.
#pragma once

#include "numbers.cuh"

namespace xattn {

struct TapTable {
  const float* taps;   // [largest^2 + 1][width]
  const int* windows;  // [width]: of each channel; 0 beyond the channels
  const int* places;   // [width]: of its first weight among all
  int width;           // channels, rounded up to pairs
  int largest;

  XATTN_DEVICE int centre() const { return largest * largest / 2; }
  XATTN_DEVICE Pack<float, 2> pair(int tap, int c) const {
    return *reinterpret_cast<const Pack<float, 2>*>(taps + static_cast<int64_t>(tap) * width + c);
  }
  XATTN_DEVICE Pack<float, 2> bias(int c) const { return pair(largest * largest, c); }
  // That of a pair: the larger one.
  XATTN_DEVICE int window(int c) const { return max(windows[c], windows[c + 1]); }
};

// Some of the groups, in order; a launch spreads so many.
struct TapGroups {
  static constexpr int kMost = 16;
  int count;
  int first[kMost], channels[kMost], window[kMost], place[kMost];
};

constexpr int kSpreadThreads = 256;

// taps, windows, places of these groups; a thread for each of (largest^2 + 1) x their channels.
template <class T>
__global__ __launch_bounds__(kSpreadThreads) void spread_taps(
    const T* __restrict__ weight, const T* __restrict__ bias, float* __restrict__ taps,
    int* __restrict__ windows, int* __restrict__ places, TapGroups groups, int width, int largest) {
  const int begin = groups.first[0];
  const int count = groups.first[groups.count - 1] + groups.channels[groups.count - 1] - begin;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSpreadThreads + threadIdx.x;
  const int tap = static_cast<int>(at / count), c = begin + static_cast<int>(at % count);
  if (tap > largest * largest) return;
  int group = 0;
  while (group + 1 < groups.count && c >= groups.first[group + 1]) ++group;
  const int window = groups.window[group], radius = window / 2;
  const int place = groups.place[group] + (c - groups.first[group]) * window * window;
  float value = 0.f;
  if (tap == largest * largest) {
    if (bias != nullptr && window > 0) value = to_float(bias[c]);
    windows[c] = window;
    places[c] = place;
  } else {
    const int dy = tap / largest - largest / 2 + radius, dx = tap % largest - largest / 2 + radius;
    const bool inside = dy >= 0 && dy < window && dx >= 0 && dx < window;
    if (inside) value = to_float(weight[place + dy * window + dx]);
  }
  taps[static_cast<int64_t>(tap) * width + c] = value;
}

}  // namespace xattn
