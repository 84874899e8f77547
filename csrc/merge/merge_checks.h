// Token merge and enhancement: the options of a call on any backend, and what its tensors must be.
#pragma once

#include <algorithm>

#include "common/checks.h"

namespace xattn {

struct MergeOptions {
  int64_t height, width, stride, prefix;

  // Beyond the image a larger stride changes nothing.
  int64_t largest_stride() const { return std::min(stride, std::max(height, width)); }
};

inline void check_merge(const MergeOptions& o, const Tensor& x, const std::optional<Tensor>& merge,
                        const Tensor& enhance, const std::optional<Tensor>& bias) {
  dtype_of(x);
  STD_TORCH_CHECK(holds_image(x, o.prefix, o.height, o.width) && o.stride > 0,
                  "merge: x must be [B, num_prefix_tokens + grid_h * grid_w, C]");
  STD_TORCH_CHECK((!merge.has_value() || convolves(*merge, x)) && convolves(enhance, x),
                  "merge: weights must be [C, 1, k, k] with odd k, in x's dtype");
  STD_TORCH_CHECK(fits(bias, {x.size(2)}, x.scalar_type()),
                  "merge: enhance_bias must be [C], in x's dtype");
}

// sizes: of the output that `grad` is the gradient of.
inline void check_merge_gradient(const Tensor& x, const std::optional<Tensor>& grad,
                                 const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(fits(grad, sizes, x.scalar_type()),
                  "merge: gradients must have the shape and dtype of the outputs");
}

}  // namespace xattn
