// A group of heads of one image: its channels as vectors, its weights, its way into scratch.
#pragma once

#include "common/depthwise_taps.h"
#include "convrel.h"
#include "convrel_products.h"

namespace xattn::XATTN_ISA::convrel {

constexpr int64_t kBlockBytes = 16 << 10;  // of one activation's tokens in scratch at a time
constexpr int64_t kBlockTokens = 64;       // at most

// Which third of qkv.
enum { kQuery, kKey, kValue };

template <class S>
struct Group : ChannelGroup<S> {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  using ChannelGroup<S>::first, ChannelGroup<S>::channels, ChannelGroup<S>::stride;

  const ConvRelArgs& args;
  int64_t block;  // tokens taken together where rows do not matter
  int64_t rows;   // image rows taken together
  Heads<T> heads;
  int64_t index = -1, image = 0;  // which group of which image

  // The last head's vectors may end beyond the group's channels.
  explicit Group(const ConvRelArgs& a)
      : ChannelGroup<S>(a.group_heads * a.head_dim,
                        (a.group_heads - 1) * a.head_dim + round_up(a.head_dim, L)),
        args(a),
        heads(a.group_heads, a.head_dim, stride) {
    block = min_of(kBlockTokens, max_of<int64_t>(8, kBlockBytes / (stride * (int64_t)sizeof(T))));
    rows = max_of<int64_t>(1, min_of(block / args.width, args.height));
  }

  void select(int64_t group) {
    index = group;
    first = group * channels;
  }
  int64_t row_tokens() const { return max_of(block, rows * args.width); }
  // The token of pixel 0 of an image row.
  int64_t token_of(int64_t y) const { return args.prefix + y * args.width; }

  const S* qkv(int part, int64_t token) const {
    return static_cast<const S*>(args.qkv) + image * args.qkv_stride[0] +
           token * args.qkv_stride[1] + part * args.channels() + first;
  }
  const S* grad_out(int64_t token) const {
    return static_cast<const S*>(args.grad_out) + image * args.grad_out_stride[0] +
           token * args.grad_out_stride[1] + first;
  }
  S* out(int64_t token) const {
    return static_cast<S*>(args.out) + (image * args.tokens() + token) * args.channels() + first;
  }
  S* grad_qkv(int part, int64_t token) const {
    return static_cast<S*>(args.grad_qkv) +
           ((image * args.tokens() + token) * 3 + part) * args.channels() + first;
  }
  // out[x] = sum[x] + by[x] * conv[x] for vector z of an image row; conv is a line, out's pixels
  // are `out_stride` apart.
  XATTN_MEMBER void write_relative(int64_t z, TokenView<T> sum, TokenView<T> by, const T* conv,
                                   S* out, int64_t out_stride) const {
    this->with_lanes(z, [&](auto lanes) XATTN_LAMBDA_INLINE {
      for (int64_t x = 0; x < args.width; ++x) {
        const auto factor = load_n(by.data + x * by.stride + z * L, lanes);
        const auto value = load(sum.data + x * sum.stride + z * L) + factor * load(conv + x * L);
        store_n(out + x * out_stride + z * L, value, lanes);
      }
    });
  }
  // Of one head: [head_dim][head_dim + 2].
  T* state(int64_t h) const {
    const int64_t at = image * args.heads + index * heads.count + h;
    return static_cast<T*>(args.state) + at * heads.dim * (heads.dim + 2);
  }
};

}  // namespace xattn::XATTN_ISA::convrel
