// Convolutional position encoding (CoaT, section 5): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/depthwise_weights.h"
#include "common/dtype.h"

namespace xattn {

// One call: x + depthwise convolution of x for the tokens of an image, in the token layout
// [batch, prefix + height * width, channels] with dense channels; strides are in elements.
struct ConvPosArgs {
  Dtype dtype;
  int64_t batch, prefix, height, width, channels;
  int64_t group_channels;  // that a kernel takes together
  int64_t bands;           // of rows, that the forward takes an image apart into
  DepthwiseWeights conv;

  const void* x;
  int64_t x_stride[2];
  void* out;  // contiguous; in the backward the gradient of x

  const void* grad_out;
  int64_t grad_out_stride[2];

  __attribute__((always_inline)) int64_t tokens() const { return prefix + height * width; }
  __attribute__((always_inline)) int64_t groups() const {
    return (channels + group_channels - 1) / group_channels;
  }
};

// A piece of the backward: one group of channels of some images, and where its share of the weight
// gradients goes: arrays of the compute type in the layout of the weights.
struct ConvPosChunk {
  int64_t group, image_begin, image_end;
  void *grad_weight, *grad_bias;
};

struct ConvPosKernels {
  int64_t (*forward_scratch)(const ConvPosArgs&);
  int64_t (*backward_scratch)(const ConvPosArgs&);
  // Units [begin, end) of images x groups x bands, the band fastest.
  void (*forward)(const ConvPosArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const ConvPosArgs&, const ConvPosChunk*, int64_t count, void* scratch);
};

}  // namespace xattn
