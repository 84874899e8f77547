// Cross-patch attention on CUDA: what the host files of its two forms share.
#pragma once

#include "common/cuda_call.h"
#include "cpsa_absorb.cuh"
#include "cpsa_checks.h"

namespace xattn::cpsa_cuda {

// A checked call.
struct Problem : CpsaTensors {
  Geometry map;
  Dtype dtype;
  int heads;
  double scale, dropout_p;
};

// What a backward returns; empty tensors for missing biases.
struct Gradients {
  Tensor x, qkv_weight, qkv_bias, proj_weight, proj_bias;
};

// The form for several heads, dropout, larger patches and, backward, more tokens.
void direct_forward(CudaCall& call, const Problem& p, Tensor& out);
void direct_backward(CudaCall& call, const Problem& p, const Tensor& grad_out, Gradients& grads);

template <class T>
Weights<T> weights_of(CudaCall& call, const Problem& p) {
  return {static_cast<const T*>(call.read(p.qkv_weight)),
          static_cast<const T*>(call.read(p.qkv_bias)),
          static_cast<const T*>(call.read(p.proj_weight)),
          static_cast<const T*>(call.read(p.proj_bias))};
}

template <class T>
WeightGrads<T> weight_grads_of(CudaCall& call, const Problem& p, Gradients& grads) {
  return {static_cast<T*>(call.write(grads.qkv_weight)),
          p.qkv_bias.has_value() ? static_cast<T*>(call.write(grads.qkv_bias)) : nullptr,
          static_cast<T*>(call.write(grads.proj_weight)),
          p.proj_bias.has_value() ? static_cast<T*>(call.write(grads.proj_bias)) : nullptr};
}

// Of a map [B, H, W, C] with dense channels. T is const where kernels only read it.
template <class T>
Map<T> map_of(T* data, const Tensor& t) {
  constexpr int64_t kChannels = 16 / sizeof(T);
  bool wide = reinterpret_cast<uintptr_t>(data) % 16 == 0 && t.size(3) % kChannels == 0;
  for (int i = 0; i < 3; ++i) wide = wide && (t.stride(i) % kChannels == 0 || t.size(i) == 1);
  return {data, t.stride(0), t.stride(1), t.stride(2), wide};
}
template <class T>
Map<const T> read_map(CudaCall& call, const Tensor& t) {
  return map_of(static_cast<const T*>(call.read(t)), t);
}
template <class T>
Map<T> write_map(CudaCall& call, Tensor& t) {
  return map_of(static_cast<T*>(call.write(t)), t);
}

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace xattn::cpsa_cuda
