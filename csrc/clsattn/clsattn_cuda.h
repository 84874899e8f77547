// CLS-query cross attention on the GPU: the tensors of a call as the kernels read them.
#pragma once

#include <algorithm>
#include <vector>

#include "clsattn_checks.h"
#include "clsattn_device.cuh"
#include "common/cuda_call.h"

namespace xattn::clsattn_cuda {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;
using Options = ClsAttnOptions;
using Tensors = ClsAttnTensors;

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

inline Tensors make_tensors(Tensors t, const Options& o) {
  check_clsattn(t, o);
  STD_TORCH_CHECK(t.patches.size(1) < INT32_MAX - kTokens && t.channels() < (1 << 24),
                  "clsattn: too many tokens or channels");
  t.lay_out(in_pieces);
  return t;
}

}  // namespace xattn::clsattn_cuda
