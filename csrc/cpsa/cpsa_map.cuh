// Cross-patch attention on CUDA: tokens between maps and rows.
//
// A token is one channel's patch, `pixels` values. In a map [batch, height, width, channels]
// channels are dense and the pixels of a token far apart; so a lane moves two neighbouring pixels
// of a patch for several channels at once, 16 bytes each where memory allows it.
#pragma once

#include "common/numbers.cuh"

namespace xattn::cpsa_cuda {

struct Geometry {
  int64_t batch;
  int height, width, channels;
  int patch_h, patch_w, pixels;  // pixels = patch_h * patch_w
  int patches_x;                 // in a row of the padded map
  int tokens;                    // of one channel of one image
};

// strides in elements. wide: vectors of channels lie at multiples of their size, none ragged.
template <class T>
struct Map {
  T* data;
  int64_t stride_b, stride_y, stride_x;
  bool wide;
};

// Channels of which one pixel has 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Pixels 2 pair and 2 pair + 1 of a patch, for kChannels channels.
template <class T, int kChannels>
struct PixelPair {
  Pack<T, kChannels> pixel[2];
};

// Where the pixel lies in the map, or -1 where it does not.
template <class T>
XATTN_DEVICE int64_t pixel_offset(const Geometry& g, const Map<T>& map, int token, int pixel) {
  const int y = token / g.patches_x * g.patch_h + pixel / g.patch_w;
  const int x = token % g.patches_x * g.patch_w + pixel % g.patch_w;
  const bool inside = token < g.tokens && pixel < g.pixels && y < g.height && x < g.width;
  return inside ? y * map.stride_y + x * map.stride_x : -1;
}

// Zeros for what lies outside.
template <int kChannels, class T>
XATTN_DEVICE PixelPair<T, kChannels> read_pair(const Geometry& g, const Map<const T>& map,
                                               int64_t image, int channel, int token, int pair) {
  PixelPair<T, kChannels> values;
  const T* const from = map.data + image * map.stride_b + channel;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t offset = pixel_offset(g, map, token, 2 * pair + i);
    values.pixel[i] = {};
    if (map.wide) {
      if (offset >= 0 && channel < g.channels) {
        values.pixel[i] = *reinterpret_cast<const Pack<T, kChannels>*>(from + offset);
      }
    } else if (offset >= 0) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (channel + c < g.channels) values.pixel[i].v[c] = from[offset + c];
      }
    }
  }
  return values;
}

template <int kChannels, class T>
XATTN_DEVICE void write_pair(const Geometry& g, const Map<T>& map, int64_t image, int channel,
                             int token, int pair, const PixelPair<T, kChannels>& values) {
  T* const to = map.data + image * map.stride_b + channel;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t offset = pixel_offset(g, map, token, 2 * pair + i);
    if (offset < 0) continue;
    if (map.wide) {
      if (channel < g.channels) {
        *reinterpret_cast<Pack<T, kChannels>*>(to + offset) = values.pixel[i];
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (channel + c < g.channels) to[offset + c] = values.pixel[i].v[c];
      }
    }
  }
}

// The pair of one channel is neighbouring elements of a row; channels are `apart` elements apart.
template <class T, int kChannels>
XATTN_DEVICE void pair_to_rows(const PixelPair<T, kChannels>& values, T* rows, int64_t apart) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    *reinterpret_cast<Pack<T, 2>*>(rows +
                                   c * apart) = {{values.pixel[0].v[c], values.pixel[1].v[c]}};
  }
}
template <int kChannels, class T>
XATTN_DEVICE PixelPair<T, kChannels> pair_from_rows(const T* rows, int64_t apart) {
  PixelPair<T, kChannels> values;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const auto both = *reinterpret_cast<const Pack<T, 2>*>(rows + c * apart);
    values.pixel[0].v[c] = both.v[0];
    values.pixel[1].v[c] = both.v[1];
  }
  return values;
}

}  // namespace xattn::cpsa_cuda
