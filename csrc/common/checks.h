// What the host files of every backend demand of their arguments. Python checks a user's arguments
// and says what is wrong with them; these checks are the second line, which keeps a direct call of
// torch.ops from reading wild memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dtype.h"

namespace xattn {

using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "xattn_ops: dtype must be float32, float64, bfloat16 or float16");
  }
}

// The type that values of a dtype are computed in, and its size.
inline torch::headeronly::ScalarType compute_type(Dtype dtype) {
  using torch::headeronly::ScalarType;
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}
inline int64_t compute_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// Whether a tensor, where there is one, has these sizes and this dtype.
inline bool fits(const std::optional<Tensor>& t, const std::vector<int64_t>& sizes,
                 torch::headeronly::ScalarType dtype) {
  if (!t.has_value()) return true;
  const auto own = t->sizes();
  return t->scalar_type() == dtype && std::vector<int64_t>(own.begin(), own.end()) == sizes;
}

// Whether x is [B, prefix + height * width, C] with an image and channels.
inline bool holds_image(const Tensor& x, int64_t prefix, int64_t height, int64_t width) {
  return x.dim() == 3 && prefix >= 0 && height > 0 && width > 0 &&
         x.size(1) == prefix + height * width && x.size(2) > 0;
}

// Whether weight is [C, 1, k, k] with odd k, for the channels of x [B, N, C] and of its dtype.
inline bool convolves(const Tensor& weight, const Tensor& x) {
  const int64_t window = weight.dim() == 4 ? weight.size(3) : 0;
  return window % 2 == 1 && fits(weight, {x.size(2), 1, window, window}, x.scalar_type());
}

inline void check_seed(const std::optional<Tensor>& seed, double dropout_p) {
  STD_TORCH_CHECK(!(dropout_p > 0) || (seed.has_value() && seed->numel() == 1 &&
                                       seed->scalar_type() == torch::headeronly::ScalarType::Long),
                  "xattn_ops: dropout needs `seed`, one int64");
}

}  // namespace xattn
