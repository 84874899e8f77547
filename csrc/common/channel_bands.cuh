// The channels of a token cut into bands of whole heads, as CUDA kernels take them.
//
// A band is read from a multiple of 16 bytes, where memory allows it, and so with some channels of
// its neighbours, which it neither mixes nor writes. Heads wider than a tile are a band each.
#pragma once

#include <algorithm>
#include <numeric>

#include "numbers.cuh"
#include "ptx.cuh"

namespace xattn {

constexpr int kTileChannels = 64;  // of a block: a warp's lanes take a pair each

struct Band {
  int low, high;   // its channels
  int start, end;  // those that it reads
};

struct Bands {
  int channels, unit;  // unit: channels of a head
  int align;           // channels of a vector, or of a pair
  int span, count;     // heads of a band, bands
  int tiles;           // of kTileChannels, that a band takes

  XATTN_DEVICE Band of(int band) const {
    const int low = band * span * unit, high = min(low + span * unit, channels);
    return {low, high, low / align * align, min((high + align - 1) / align * align, channels)};
  }
};

// Bands of about the same number of heads. vector: 16 bytes at a time can be read.
inline Bands cut_into_bands(int64_t channels, int64_t unit, int64_t value_bytes, bool vector) {
  const int64_t align = vector ? 16 / value_bytes : 2;
  const int64_t slack = align - std::gcd(unit, align), heads = channels / unit;
  const int64_t most = std::max<int64_t>(1, (kTileChannels - slack) / unit);
  const int64_t count = (heads + most - 1) / most, span = (heads + count - 1) / count;
  const int64_t tiles = (slack + span * unit + kTileChannels - 1) / kTileChannels;
  return {static_cast<int>(channels), static_cast<int>(unit),  static_cast<int>(align),
          static_cast<int>(span),     static_cast<int>(count), static_cast<int>(tiles)};
}

// Bands of whole vectors, whatever the heads.
inline Bands cut_channels(int64_t channels, int64_t value_bytes, bool vector) {
  const int64_t align = vector ? 16 / value_bytes : 2;
  const int64_t count = (channels + kTileChannels - 1) / kTileChannels;
  const int64_t span = ((channels + count - 1) / count + align - 1) / align * align;
  return {static_cast<int>(channels),
          1,
          static_cast<int>(align),
          static_cast<int>(span),
          static_cast<int>((channels + span - 1) / span),
          1};
}

// Rows of channels of one image, at its first row and a tile's first channel.
template <class T>
struct ChannelRows {
  const T* data;
  int64_t stride;
  int channels;  // that there are, at most kTileChannels of them read
  bool vector;   // 16 bytes at a time

  XATTN_DEVICE const T* row(int64_t n) const { return data + n * stride; }
};

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // channels that are copied together
template <class T>
constexpr int kTileChunks = kTileChannels / kChunk<T>;

// 16 bytes of row n to shared memory; zeros where not `valid` and beyond the channels. Vectors are
// on their way until cp_async_wait.
template <class T>
XATTN_DEVICE void load_chunk(T* to, const ChannelRows<T>& from, int64_t n, int chunk, bool valid) {
  const int first = chunk * kChunk<T>;
  const T* source = from.row(n) + first;
  if (from.vector) {
    ptx::cp_async<16>(to, source, valid && first < from.channels);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      to[i] = valid && first + i < from.channels ? source[i] : from_float<T>(0.f);
    }
  }
}

// Channels c and c + 1 of row n, zero beyond the channels; c is even.
template <class T>
XATTN_DEVICE Pack<float, 2> load_pair(const ChannelRows<T>& from, int64_t n, int c) {
  const T* source = from.row(n) + c;
  if (from.vector) {
    const auto pair = *reinterpret_cast<const Pack<T, 2>*>(source);
    return {{to_float(pair.v[0]), to_float(pair.v[1])}};
  }
  const bool both = c + 1 < from.channels;
  return {{to_float(source[0]), both ? to_float(source[1]) : 0.f}};
}

template <class T>
XATTN_DEVICE Pack<float, 2> load_pair(const T* shared) {
  const auto pair = *reinterpret_cast<const Pack<T, 2>*>(shared);
  return {{to_float(pair.v[0]), to_float(pair.v[1])}};
}

// Channels c and c + 1 of a row of a tensor, those of the band; vector: whole pairs are aligned.
template <class T>
XATTN_DEVICE void store_pair(T* row, int c, const Band& band, Pack<float, 2> value, bool vector) {
  const bool left = c >= band.low && c < band.high, right = c + 1 >= band.low && c + 1 < band.high;
  if (vector && left && right) {
    *reinterpret_cast<Pack<T, 2>*>(row +
                                   c) = {{from_float<T>(value.v[0]), from_float<T>(value.v[1])}};
    return;
  }
  if (left) row[c] = from_float<T>(value.v[0]);
  if (right) row[c + 1] = from_float<T>(value.v[1]);
}

}  // namespace xattn
