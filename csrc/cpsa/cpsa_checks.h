// Cross-patch attention: the arguments of a call on any backend, and what they must be.
#pragma once

#include "common/tensors.h"

namespace xattn {

struct CpsaOptions {
  int64_t patch_h, patch_w, heads;
  double scale, dropout_p;

  int64_t pixels() const { return patch_h * patch_w; }  // of a patch
};

struct CpsaTensors {
  Tensor x, qkv_weight, proj_weight;
  std::optional<Tensor> qkv_bias, proj_bias, seed;

  // Dense channels, contiguous weights.
  void lay_out() {
    x = dense_last(x);
    for (Tensor* t : {&qkv_weight, &proj_weight}) *t = torch::stable::contiguous(*t);
    for (auto* t : {&qkv_bias, &proj_bias}) *t = contiguous_or_null(*t);
  }
};

inline void check_cpsa(const CpsaTensors& in, const CpsaOptions& o) {
  dtype_of(in.x);
  STD_TORCH_CHECK(in.x.dim() == 4, "cpsa: x must be [B, H, W, C]");
  STD_TORCH_CHECK(o.patch_h > 0 && o.patch_w > 0, "cpsa: patch must be positive");
  const int64_t n = o.pixels();
  STD_TORCH_CHECK(o.heads > 0 && n % o.heads == 0, "cpsa: num_heads must divide h * w");
  check_seed(in.seed, o.dropout_p);
  const auto has = [&](const std::optional<Tensor>& t, const std::vector<int64_t>& sizes,
                       const char* name) {
    STD_TORCH_CHECK(fits(t, sizes, in.x.scalar_type()), "cpsa: ", name,
                    " has the wrong shape or dtype");
  };
  has(in.qkv_weight, {3 * n, n}, "qkv_weight");
  has(in.qkv_bias, {3 * n}, "qkv_bias");
  has(in.proj_weight, {n, n}, "proj_weight");
  has(in.proj_bias, {n}, "proj_bias");
}

inline void check_cpsa_gradient(const CpsaTensors& in, const Tensor& grad_out) {
  const auto sizes = in.x.sizes();
  STD_TORCH_CHECK(fits(grad_out, {sizes.begin(), sizes.end()}, in.x.scalar_type()),
                  "cpsa: grad_out has the wrong shape or dtype");
}

}  // namespace xattn
