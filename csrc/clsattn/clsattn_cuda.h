// CLS-query cross attention on the GPU: the tensors of a call, checked and in the layout that the
// kernels read.
#pragma once

#include <algorithm>
#include <vector>

#include "clsattn_device.cuh"
#include "common/cuda_call.h"

namespace xattn::clsattn_cuda {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

struct Options {
  int64_t heads;
  double eps, scale, dropout_p;
};

// The tensors of a call in the layout that the kernels read.
struct Tensors {
  Tensor cls, patches, q_weight, k_weight, v_weight;
  Optional q_bias, v_bias, norm_weight, norm_bias, seed;
};

inline void check(const Tensors& in, const Options& o) {
  const Dtype dtype = dtype_of(in.cls);
  STD_TORCH_CHECK(in.cls.dim() == 3 && in.cls.size(1) == 1 && in.cls.size(2) > 0,
                  "clsattn: cls_token must be [B, 1, C]");
  const int64_t channels = in.cls.size(2);
  STD_TORCH_CHECK(in.patches.dim() == 3 && in.patches.size(0) == in.cls.size(0) &&
                      in.patches.size(1) > 0 && in.patches.size(2) == channels &&
                      dtype_of(in.patches) == dtype,
                  "clsattn: patches must be [B, N, C] of cls_token's batch, channels and dtype");
  STD_TORCH_CHECK(in.patches.size(1) < INT32_MAX - kTokens && channels < (1 << 24),
                  "clsattn: too many tokens or channels");
  STD_TORCH_CHECK(o.heads > 0 && channels % o.heads == 0,
                  "clsattn: num_heads must divide the channels");
  for (const Tensor* t : {&in.q_weight, &in.k_weight, &in.v_weight}) {
    STD_TORCH_CHECK(
        t->dim() == 2 && t->size(0) == channels && t->size(1) == channels && dtype_of(*t) == dtype,
        "clsattn: weights must be [C, C] of cls_token's dtype");
  }
  for (const Optional* t : {&in.q_bias, &in.v_bias, &in.norm_weight, &in.norm_bias}) {
    STD_TORCH_CHECK(!t->has_value() || ((*t)->numel() == channels && dtype_of(**t) == dtype),
                    "clsattn: biases and the norm's weights must be [C] of cls_token's dtype");
  }
  STD_TORCH_CHECK(in.norm_weight.has_value() || !in.norm_bias.has_value(),
                  "clsattn: norm_bias needs norm_weight");
  STD_TORCH_CHECK(o.dropout_p == 0 || (in.seed.has_value() && in.seed->numel() == 1 &&
                                       in.seed->scalar_type() == ScalarType::Long),
                  "clsattn: dropout needs `seed`, one int64");
}

template <class T>
Inputs<T> make_inputs(CudaCall& call, const Tensors& t, const Options& o) {
  Inputs<T> in{};
  in.batch = t.cls.size(0);
  in.tokens = static_cast<int>(1 + t.patches.size(1));
  in.heads = static_cast<int>(o.heads);
  in.channels = static_cast<int>(t.cls.size(2));
  in.head_dim = in.channels / in.heads;
  in.eps = static_cast<float>(o.eps);
  in.scale = static_cast<float>(o.scale);
  in.dropout = make_dropout(t.seed ? call.read(*t.seed) : nullptr, o.dropout_p);
  // Images are cut where there are fewer than a large card runs blocks at once, down to two tiles.
  constexpr int kBlocks = 256;
  const int wanted = in.batch < kBlocks ? kBlocks / std::max(static_cast<int>(in.batch), 1) : 1;
  const int tiles = (in.tokens + kTokens - 1) / kTokens, parts = std::clamp(tiles / 2, 1, wanted);
  in.per_part = (tiles + parts - 1) / parts * kTokens;
  in.parts = (in.tokens + in.per_part - 1) / in.per_part;

  in.cls = static_cast<const T*>(call.read(t.cls));
  in.patches = static_cast<const T*>(call.read(t.patches));
  const auto stride = [](const Tensor& x, int i) { return x.size(i) > 1 ? x.stride(i) : 0; };
  in.cls_stride = stride(t.cls, 0);
  for (int i = 0; i < 2; ++i) in.patches_stride[i] = stride(t.patches, i);
  in.norm_weight = static_cast<const T*>(call.read(t.norm_weight));
  in.norm_bias = static_cast<const T*>(call.read(t.norm_bias));
  return in;
}

// Memory that kernels of a call hand on to one another.
class Workspace {
 public:
  explicit Workspace(CudaCall& call, ScalarType storage) : call_(call), storage_(storage) {}
  template <class V>
  V* take(std::vector<int64_t> sizes) {
    held_.push_back(call_.empty(sizes, std::is_same_v<V, float> ? ScalarType::Float : storage_));
    return static_cast<V*>(call_.write(held_.back()));
  }

 private:
  CudaCall& call_;
  ScalarType storage_;
  std::vector<Tensor> held_;
};

constexpr int64_t kStep = 16;  // channels of a product: the fused kernels take multiples

// The tensor itself where the fused kernels can copy pieces of 16 bytes, else a dense copy: sums
// come out the same whatever the layout.
inline Tensor in_pieces(const Tensor& t) {
  if (t.size(t.dim() - 1) % kStep != 0) return dense_last(t);
  bool fits =
      t.stride(t.dim() - 1) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < t.dim() - 1; ++i) {
    const int64_t bytes = t.stride(i) * static_cast<int64_t>(t.element_size());
    fits = fits && (t.size(i) == 1 || bytes % 16 == 0);
  }
  if (fits) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensors make_tensors(const Tensor& cls, const Tensor& patches, const Tensor& q_weight,
                            const Optional& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                            const Optional& v_bias, const Optional& norm_weight,
                            const Optional& norm_bias, const Optional& seed,
                            const Options& options) {
  using torch::stable::contiguous;
  Tensors t{in_pieces(cls),
            in_pieces(patches),
            contiguous(q_weight),
            contiguous(k_weight),
            contiguous(v_weight),
            contiguous_or_null(q_bias),
            contiguous_or_null(v_bias),
            contiguous_or_null(norm_weight),
            contiguous_or_null(norm_bias),
            seed};
  check(t, options);
  return t;
}

inline std::vector<int64_t> head_sizes(const Tensors& t, const Options& o) {
  const int64_t channels = t.cls.size(2);
  return {t.cls.size(0), o.heads, channels / o.heads + 2 * channels};
}
inline std::vector<int64_t> token_sizes(const Tensors& t, const Options& o) {
  return {t.cls.size(0), o.heads + (t.norm_weight ? 2 : 0), 1 + t.patches.size(1)};
}

}  // namespace xattn::clsattn_cuda
