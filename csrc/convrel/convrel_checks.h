// Conv-relative attention: the options of a call on any backend, and what its tensors must be.
#pragma once

#include "common/checks.h"

namespace xattn {

struct ConvRelOptions {
  std::vector<int64_t> windows, channels;  // of each group of channels
  int64_t heads, height, width, prefix;
  double scale;
};

inline void check_convrel(const ConvRelOptions& o, const Tensor& qkv, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  const auto dtype = qkv.scalar_type();
  dtype_of(qkv);
  STD_TORCH_CHECK(holds_image(qkv, o.prefix, o.height, o.width),
                  "convrel: qkv must be [B, num_prefix_tokens + grid_h * grid_w, 3C]");
  STD_TORCH_CHECK(o.heads > 0 && qkv.size(2) % (3 * o.heads) == 0,
                  "convrel: num_heads must divide the channels");
  STD_TORCH_CHECK(o.windows.size() == o.channels.size(),
                  "convrel: one window for each channel group");
  int64_t covered = 0, weights = 0;
  for (size_t g = 0; g < o.windows.size(); ++g) {
    STD_TORCH_CHECK(o.windows[g] > 0 && o.windows[g] % 2 == 1, "convrel: windows must be odd");
    STD_TORCH_CHECK(o.channels[g] >= 0, "convrel: a channel group cannot be negative");
    covered += o.channels[g];
    weights += o.channels[g] * o.windows[g] * o.windows[g];
  }
  STD_TORCH_CHECK(covered == 0 || covered == qkv.size(2) / 3,
                  "convrel: the channel groups must cover all channels");
  STD_TORCH_CHECK(weight.numel() == weights && weight.scalar_type() == dtype,
                  "convrel: conv_weight must hold every group's windows, in qkv's dtype");
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == covered && bias->scalar_type() == dtype),
                  "convrel: conv_bias must be [C], in qkv's dtype");
}

inline void check_convrel_gradient(const ConvRelOptions& o, const Tensor& qkv,
                                   const Tensor& grad_out, const Tensor& state) {
  const int64_t channels = qkv.size(2) / 3, head_dim = channels / o.heads;
  STD_TORCH_CHECK(fits(grad_out, {qkv.size(0), qkv.size(1), channels}, qkv.scalar_type()),
                  "convrel: grad_out must have the shape and dtype of the output");
  STD_TORCH_CHECK(
      fits(state, {qkv.size(0), o.heads, head_dim, head_dim + 2}, compute_type(dtype_of(qkv))),
      "convrel: state must come from convrel_fwd");
}

}  // namespace xattn
