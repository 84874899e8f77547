// Convolutional position encoding: the options of a call on any backend, and what its tensors must
// be.
#pragma once

#include "common/checks.h"

namespace xattn {

struct ConvPosOptions {
  int64_t height, width, prefix;
};

inline void check_convpos(const ConvPosOptions& o, const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  dtype_of(x);
  STD_TORCH_CHECK(holds_image(x, o.prefix, o.height, o.width),
                  "convpos: x must be [B, num_prefix_tokens + grid_h * grid_w, C]");
  STD_TORCH_CHECK(convolves(weight, x),
                  "convpos: weight must be [C, 1, k, k] with odd k, in x's dtype");
  STD_TORCH_CHECK(fits(bias, {x.size(2)}, x.scalar_type()),
                  "convpos: bias must be [C], in x's dtype");
}

inline void check_convpos_gradient(const Tensor& x, const Tensor& grad_out) {
  STD_TORCH_CHECK(fits(grad_out, {x.size(0), x.size(1), x.size(2)}, x.scalar_type()),
                  "convpos: grad_out must have the shape and dtype of the output");
}

}  // namespace xattn
