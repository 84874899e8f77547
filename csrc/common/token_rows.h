// Tokens of an activation in memory, and the rows of its images on their way through scratch.
#pragma once

#include "channel_group.h"
#include "depthwise.h"

namespace xattn::XATTN_ISA {

// [batch, prefix + height * width, channels] with dense channels.
template <class S>
struct Tokens {
  const S* data;
  const int64_t* stride;  // of images, of tokens
  int64_t prefix;

  const S* at(int64_t image, int64_t token, int64_t channel) const {
    return data + image * stride[0] + token * stride[1] + channel;
  }
};

// A group of channels of an image, row after row in a ring.
template <class S>
struct TokenRows {
  using T = typename ComputeOf<S>::type;
  const ChannelGroup<S>& group;
  Tokens<S> from;
  PaddedRows<T> rows;
  int64_t image = 0, ready = 0;  // `ready`: the first row that is not in the ring

  TokenRows(Arena& arena, const ChannelGroup<S>& group, Tokens<S> from, int64_t height,
            int64_t width, int64_t largest_window)
      : group(group), from(from), rows(arena, height, width, group.vectors, largest_window, 1) {}

  // The next rows are those of `next_image`, from `first` on or as far before it as windows reach.
  void begin(int64_t next_image, int64_t first) {
    image = next_image;
    ready = max_of<int64_t>(0, first - rows.margin);
  }
  // Rows up to what windows around row y reach.
  void reach(int64_t y) {
    for (; ready < min_of(rows.height, y + 1 + rows.margin); ++ready) {
      group.gather_lines_ahead(from.at(image, from.prefix + ready * rows.width, group.first),
                               from.stride[1], rows.width, rows.row(ready), rows.line);
    }
  }
  // The tokens before the image, to `out`.
  void copy_prefix(S* out, int64_t out_stride) const {
    group.copy(from.at(image, 0, group.first), from.stride[1], from.prefix, out, out_stride);
  }
};

}  // namespace xattn::XATTN_ISA
