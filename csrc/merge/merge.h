// Token merge and enhancement (CabViT, section 3.1): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/depthwise_weights.h"
#include "common/dtype.h"

namespace xattn {

// One call: two depthwise convolutions of an image's tokens, in the token layout
// [batch, prefix + height * width, channels] with dense channels; strides are in elements.
struct MergeArgs {
  Dtype dtype;
  int64_t batch, prefix, height, width, channels;
  int64_t stride;          // of the merge
  int64_t group_channels;  // that a kernel takes together
  int64_t bands;           // of rows, that the forward takes an image apart into
  DepthwiseWeights merge;  // of no window where there is none; without bias
  DepthwiseWeights enhance;

  const void* x;
  int64_t x_stride[2];
  void* digests;  // [batch, merged_height * merged_width, channels], contiguous
  void* out;      // [batch, tokens, channels], contiguous: enhanced; in the backward grad_x

  // Backward only; null where an output has no gradient.
  const void *grad_digests, *grad_enhanced;
  int64_t grad_digests_stride[2], grad_enhanced_stride[2];

  __attribute__((always_inline)) int64_t tokens() const { return prefix + height * width; }
  __attribute__((always_inline)) int64_t merged_height() const {
    return (height + stride - 1) / stride;
  }
  __attribute__((always_inline)) int64_t merged_width() const {
    return (width + stride - 1) / stride;
  }
  __attribute__((always_inline)) int64_t groups() const {
    return (channels + group_channels - 1) / group_channels;
  }
};

// A piece of the backward: one group of channels of some images, and where its share of the weight
// gradients goes: arrays of the compute type in the layout of the weights, null for a weight that
// is not there.
struct MergeChunk {
  int64_t group, image_begin, image_end;
  void *grad_merge, *grad_enhance, *grad_bias;
};

struct MergeKernels {
  int64_t (*forward_scratch)(const MergeArgs&);
  int64_t (*backward_scratch)(const MergeArgs&);
  // Units [begin, end) of groups x images x bands, the band fastest.
  void (*forward)(const MergeArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const MergeArgs&, const MergeChunk*, int64_t count, void* scratch);
};

}  // namespace xattn
