// CLS-query cross attention: the arguments of a call on any backend, and what they must be.
#pragma once

#include "common/tensors.h"

namespace xattn {

struct ClsAttnOptions {
  int64_t heads;
  double eps, scale, dropout_p;
};

struct ClsAttnTensors {
  Tensor cls, patches, q_weight, k_weight, v_weight;
  std::optional<Tensor> q_bias, v_bias, norm_weight, norm_bias, seed;

  int64_t batch() const { return cls.size(0); }
  int64_t channels() const { return cls.size(2); }

  // Weights become contiguous; `readable` gives cls and patches as the kernels read them.
  template <class F>
  void lay_out(F readable) {
    cls = readable(cls);
    patches = readable(patches);
    for (Tensor* t : {&q_weight, &k_weight, &v_weight}) *t = torch::stable::contiguous(*t);
    for (auto* t : {&q_bias, &v_bias, &norm_weight, &norm_bias}) *t = contiguous_or_null(*t);
  }

  // Of the states that the forward leaves for the backward.
  std::vector<int64_t> head_sizes(const ClsAttnOptions& o) const {
    return {batch(), o.heads, channels() / o.heads + 2 * channels()};
  }
  std::vector<int64_t> token_sizes(const ClsAttnOptions& o) const {
    return {batch(), o.heads + (norm_weight ? 2 : 0), 1 + patches.size(1)};
  }
};

inline void check_clsattn(const ClsAttnTensors& in, const ClsAttnOptions& o) {
  const Tensor& cls = in.cls;
  STD_TORCH_CHECK(cls.dim() == 3 && cls.size(1) == 1 && cls.size(2) > 0,
                  "clsattn: cls_token must be [B, 1, C]");
  dtype_of(cls);
  const auto dtype = cls.scalar_type();
  const int64_t channels = in.channels();
  STD_TORCH_CHECK(in.patches.dim() == 3 && in.patches.size(1) > 0 &&
                      in.patches.size(1) < INT32_MAX &&
                      fits(in.patches, {in.batch(), in.patches.size(1), channels}, dtype),
                  "clsattn: patches must be [B, N, C] of cls_token's batch, channels and dtype");
  STD_TORCH_CHECK(o.heads > 0 && channels % o.heads == 0,
                  "clsattn: num_heads must divide the channels");
  for (const Tensor* t : {&in.q_weight, &in.k_weight, &in.v_weight}) {
    STD_TORCH_CHECK(fits(*t, {channels, channels}, dtype),
                    "clsattn: weights must be [C, C] of cls_token's dtype");
  }
  for (const auto* t : {&in.q_bias, &in.v_bias, &in.norm_weight, &in.norm_bias}) {
    STD_TORCH_CHECK(fits(*t, {channels}, dtype),
                    "clsattn: biases and the norm's weights must be [C] of cls_token's dtype");
  }
  STD_TORCH_CHECK(in.norm_weight.has_value() || !in.norm_bias.has_value(),
                  "clsattn: norm_bias needs norm_weight");
  check_seed(in.seed, o.dropout_p);
}

inline void check_clsattn_gradient(const ClsAttnTensors& in, const ClsAttnOptions& o,
                                   const Tensor& grad_out, const Tensor& head_state,
                                   const Tensor& token_state) {
  STD_TORCH_CHECK(fits(grad_out, {in.batch(), 1, in.channels()}, in.cls.scalar_type()),
                  "clsattn: grad_out must have the shape and dtype of the output");
  const auto compute = compute_type(dtype_of(in.cls));
  STD_TORCH_CHECK(
      fits(head_state, in.head_sizes(o), compute) && fits(token_state, in.token_sizes(o), compute),
      "clsattn: head_state and token_state must be what clsattn_fwd returned");
}

}  // namespace xattn
