// Where the tokens of a window lie in memory: padding and shift are index arithmetic here, never a
// padded or rolled copy of the map.
#pragma once

#include "common/arena.h"
#include "ipsa.h"

namespace xattn::XATTN_ISA {

// Rows of one part (q, k, v or a gradient) of one head, by token.
template <class S>
struct TokenRows {
  const S* base;          // of the head's channels
  const int64_t* offset;  // per token, or -1 outside the image
  const S* outside;       // the row of a token outside the image
  const S* row(int64_t t) const { return offset[t] < 0 ? outside : base + offset[t]; }
};

// Token offsets of one window, in elements, -1 outside the image.
struct Window {
  int64_t* qkv;       // into the strided qkv
  int64_t* pixel;     // of the token's pixel in a contiguous [batch, height, width]
  int64_t* grad_out;  // into the strided output gradient; only filled for the backward
  int edge;           // bit 0: the shift's vertical seam runs through it, bit 1: the horizontal one

  static int64_t bytes(const IpsaArgs& a) { return 3 * a.tokens() * (int64_t)sizeof(int64_t); }
};

// q (which = 0), k (1) or v (2) of one head in one window.
template <class U, class S = typename U::Storage>
TokenRows<S> qkv_rows(const IpsaArgs& a, const Window& w, int64_t head, int which, const S* zeros) {
  const int64_t at = (which * a.heads + head) * a.head_dim;
  const S* outside = a.pad_qkv ? (const S*)a.pad_qkv + at : zeros;
  return {(const S*)a.qkv + at, w.qkv, outside};
}

XATTN_INLINE Window new_window(const IpsaArgs& a, Arena& arena) {
  return {arena.take<int64_t>(a.tokens()), arena.take<int64_t>(a.tokens()),
          arena.take<int64_t>(a.tokens()), 0};
}

static void locate(const IpsaArgs& a, int64_t index, bool backward, Window& w) {
  const int64_t wx = index % a.windows_x, wy = index / a.windows_x % a.windows_y;
  const int64_t b = index / (a.windows_x * a.windows_y);
  const int64_t padded_h = a.windows_y * a.window_h, padded_w = a.windows_x * a.window_w;
  int64_t t = 0;
  for (int64_t ty = 0; ty < a.window_h; ++ty) {
    int64_t y = wy * a.window_h + ty + a.shift_h;  // undo the roll by -shift
    if (y >= padded_h) y -= padded_h;
    for (int64_t tx = 0; tx < a.window_w; ++tx, ++t) {
      int64_t x = wx * a.window_w + tx + a.shift_w;
      if (x >= padded_w) x -= padded_w;
      const bool inside = y < a.height && x < a.width;
      w.qkv[t] = inside ? b * a.qkv_stride[0] + y * a.qkv_stride[1] + x * a.qkv_stride[2] : -1;
      w.pixel[t] = inside ? (b * a.height + y) * a.width + x : -1;
      if (backward) {
        w.grad_out[t] =
            inside ? b * a.grad_out_stride[0] + y * a.grad_out_stride[1] + x * a.grad_out_stride[2]
                   : -1;
      }
    }
  }
  w.edge = (a.shift_h > 0 && wy == a.windows_y - 1) | (a.shift_w > 0 && wx == a.windows_x - 1) << 1;
}

}  // namespace xattn::XATTN_ISA
