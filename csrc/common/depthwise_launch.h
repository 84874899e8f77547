// Depthwise convolutions on CUDA, host side: one call's kernels spread for the device, and their
// gradients.
#pragma once

#include <tuple>
#include <vector>

#include "cuda_call.h"
#include "depthwise_strip.cuh"

namespace xattn {

// Whether all rows of the last dimension, which is dense, are whole vectors of 16 bytes.
bool in_vectors(const Tensor& t);

// What the gradients of the kernels are made of: those of the outputs, and the inputs, each
// [batch, tokens, ...] at channel 0.
struct DepthwiseActivations {
  const void *grad, *values;
  int64_t grad_stride[2], value_stride[2];
  int64_t batch, prefix, height, width, channels;
  bool vector;  // both are in vectors
};

class DepthwiseCuda {
 public:
  // weight: all groups' kernels, flat; bias: [channels]. Group g has channels[g] with a square
  // window of windows[g].
  DepthwiseCuda(CudaCall& call, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::vector<int64_t>& windows, const std::vector<int64_t>& channels);

  int64_t largest() const { return largest_; }  // 0: no convolution
  const TapTable& table() const { return table_; }

  // Gradients of the flat weight and of the bias (empty without one).
  std::tuple<Tensor, Tensor> gradients(CudaCall& call, const DepthwiseActivations& of) const;

 private:
  struct Group {
    int64_t first, channels, window, place;
  };

  void spread(CudaCall& call, int64_t width);

  Tensor weight_;
  std::optional<Tensor> bias_;
  std::optional<Tensor> taps_, places_;  // what the table points into
  std::vector<Group> groups_;
  int64_t largest_ = 0;
  TapTable table_{};
};

}  // namespace xattn
