// Where the tokens of a window lie in the map: shift, padding and window are arithmetic on rows and
// columns, never a rolled or padded copy.
#pragma once

#include "common/mma.cuh"
#include "common/philox.cuh"

namespace xattn::ipsa_cuda {

constexpr int kThreads = 128;  // 4 warps, 16 rows of a tile each
constexpr int kTile = 64;      // tokens of a tile
constexpr float kNever = -INFINITY;

// One call, see IpsaArgs of ipsa.h: maps are [batch, height, width, channels] with dense channels,
// strides in elements; T is the storage type.
template <class T>
struct Args {
  int height, width, heads, head_dim;
  int window_h, window_w, shift_h, shift_w, windows_y, windows_x;
  int64_t windows;    // of the whole batch
  int64_t block_run;  // windows that one block takes in turn, where it takes several
  float scale;
  Dropout dropout;
  bool wide;  // every row of a head is whole pieces of 16 bytes, aligned

  const T* qkv;  // (3, heads, head_dim) in the last dimension
  int64_t qkv_stride[3];
  const T* bias_table;  // [bins, heads], or null
  const T* pad_qkv;     // [3 * heads * head_dim], or null: zeros
  T* out;               // contiguous

  // Backward only.
  const T* grad_out;
  int64_t grad_out_stride[3];
  T* grad_qkv;        // contiguous
  float* statistics;  // [windows, heads, 3, tiles * kTile], of windows of several tiles
  float* bias_parts;  // [parts, bins, heads], or null
  float* pad_parts;   // [parts, 3, heads, head_dim], or null

  XATTN_DEVICE int channels() const { return heads * head_dim; }
  XATTN_DEVICE int tokens() const { return window_h * window_w; }
  XATTN_DEVICE int tiles() const { return (tokens() + kTile - 1) / kTile; }
  XATTN_DEVICE int bins() const { return (2 * window_h - 1) * (2 * window_w - 1); }
};

// A window of the batch: its image, and its place in the image's grid of windows.
struct Window {
  int64_t index, image;
  int y, x;
};

template <class T>
XATTN_DEVICE Window window_at(const Args<T>& a, int64_t index) {
  const int64_t row = index / a.windows_x;
  return {index, row / a.windows_y, static_cast<int>(row % a.windows_y),
          static_cast<int>(index % a.windows_x)};
}

template <class T>
XATTN_DEVICE Window next_window(const Args<T>& a, Window w) {
  ++w.index;
  if (++w.x < a.windows_x) return w;
  w.x = 0;
  if (++w.y < a.windows_y) return w;
  w.y = 0;
  ++w.image;
  return w;
}

// The windows from `first` on that a block takes.
template <class T>
XATTN_DEVICE int64_t run_length(const Args<T>& a, int64_t first) {
  return a.windows - first < a.block_run ? a.windows - first : a.block_run;
}

// A token of any window: its row and column there.
struct Token {
  int y, x;
  bool real;  // or one that only fills a tile
};

template <class T>
XATTN_DEVICE Token token_at(const Args<T>& a, int t) {
  return {t / a.window_w, t % a.window_w, t < a.tokens()};
}

// Rows of the bias table are code(query) - code(key) + centre.
template <class T>
XATTN_DEVICE int code(const Args<T>& a, const Token& t) {
  return t.y * (2 * a.window_w - 1) + t.x;
}
template <class T>
XATTN_DEVICE int code_centre(const Args<T>& a) {
  return (a.window_h - 1) * (2 * a.window_w - 1) + a.window_w - 1;
}

// Where a token of a window stands in its image.
struct Place {
  int y, x;
  bool inside, padding;  // neither: it only fills a tile
  int region;            // bit 0: it went around the edge in y, bit 1: in x; regions are strangers
};

template <class T>
XATTN_DEVICE Place place_of(const Args<T>& a, const Window& w, const Token& t) {
  const int padded_h = a.windows_y * a.window_h, padded_w = a.windows_x * a.window_w;
  int y = w.y * a.window_h + t.y + a.shift_h, x = w.x * a.window_w + t.x + a.shift_w;
  const bool around_y = y >= padded_h, around_x = x >= padded_w;
  if (around_y) y -= padded_h;
  if (around_x) x -= padded_w;
  const bool inside = t.real && y < a.height && x < a.width;
  return {y, x, inside, t.real && !inside, around_y + 2 * around_x};
}

// Whether the shift's seam runs through a window: bit 0 in y, bit 1 in x.
template <class T>
XATTN_DEVICE int seams(const Args<T>& a, const Window& w) {
  return (a.shift_h > 0 && w.y == a.windows_y - 1) + 2 * (a.shift_w > 0 && w.x == a.windows_x - 1);
}

// A pixel's offset in a map of the image's size with these strides.
XATTN_DEVICE int64_t pixel_offset(const int64_t (&stride)[3], const Window& w, const Place& p) {
  return w.image * stride[0] + p.y * stride[1] + p.x * stride[2];
}

// The row of a token in a contiguous map of `channels`, from channel `first` on; null outside.
template <class T>
XATTN_DEVICE T* row_of(const Args<T>& a, T* map, const Window& w, const Place& p, int channels,
                       int first) {
  if (!p.inside) return nullptr;
  return map + ((w.image * a.height + p.y) * a.width + p.x) * channels + first;
}

// Of the output, and of the gradient of q (k and v lie behind it), from a head's channel 0 on.
template <class T>
XATTN_DEVICE T* out_row(const Args<T>& a, const Window& w, const Token& t, int head) {
  return row_of(a, a.out, w, place_of(a, w, t), a.channels(), head * a.head_dim);
}
template <class T>
XATTN_DEVICE T* grad_row(const Args<T>& a, const Window& w, const Token& t, int head) {
  return row_of(a, a.grad_qkv, w, place_of(a, w, t), 3 * a.channels(), head * a.head_dim);
}

}  // namespace xattn::ipsa_cuda
