// Factorised conv-relative attention (CoaT, section 4): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/depthwise_weights.h"
#include "common/dtype.h"

namespace xattn {

// One call. Activations are [batch, tokens, channels] with dense channels; strides are in elements.
struct ConvRelArgs {
  Dtype dtype;
  int64_t batch, prefix, height, width;  // tokens = prefix + height * width
  int64_t heads, head_dim;
  int64_t group_heads;  // heads that a kernel takes together; divides heads
  double scale;
  DepthwiseWeights conv;

  const void* qkv;  // (3, heads, head_dim) in the last dimension
  int64_t qkv_stride[2];
  // [batch, heads, head_dim, head_dim + 2] of the compute type: for each channel of k the row of
  // softmax(K)^T V, the column's maximum and one over its sum.
  void* state;
  void* out;  // [batch, tokens, heads * head_dim], contiguous

  // Backward only.
  const void* grad_out;
  int64_t grad_out_stride[2];
  void* grad_qkv;  // contiguous

  __attribute__((always_inline)) int64_t tokens() const { return prefix + height * width; }
  __attribute__((always_inline)) int64_t channels() const { return heads * head_dim; }
  __attribute__((always_inline)) int64_t groups() const { return heads / group_heads; }
};

// A piece of the backward: one group of heads of some images, and where its share of the weight
// gradients goes: arrays of the compute type in the layout of the weights.
struct ConvRelChunk {
  int64_t group, image_begin, image_end;
  void *grad_weight, *grad_bias;
};

struct ConvRelKernels {
  int64_t (*forward_scratch)(const ConvRelArgs&);
  int64_t (*backward_scratch)(const ConvRelArgs&);
  // Units [begin, end) of groups x images, the image fastest.
  void (*forward)(const ConvRelArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const ConvRelArgs&, const ConvRelChunk*, int64_t count, void* scratch);
};

}  // namespace xattn
