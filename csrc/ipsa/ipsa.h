// Inner-patch attention (CAT, section 3.1.1): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace xattn {

// One call. Activations are [batch, height, width, channels] with dense channels; strides are in
// elements. `window` tokens attend to each other: n = window_h * window_w.
struct IpsaArgs {
  Dtype dtype;
  int64_t batch, height, width;
  int64_t heads, head_dim;
  int64_t window_h, window_w;
  int64_t shift_h, shift_w;
  int64_t windows_y, windows_x;  // of the padded map

  const void* qkv;  // (3, heads, head_dim) in the last dimension
  int64_t qkv_stride[3];
  const void* bias_table;  // [(2 window_h - 1) * (2 window_w - 1), heads], or null
  const void* pad_qkv;     // [3 * heads * head_dim]: a token outside the image, or null for zeros
  double scale;
  double dropout_p;
  uint32_t dropout_key[2];

  void* out;          // [batch, height, width, heads * head_dim], contiguous
  int64_t out_pixel;  // elements from one pixel of it to the next

  // Backward only.
  const void* grad_out;
  int64_t grad_out_stride[3];
  void* grad_qkv;  // contiguous

  // Always inline: an out-of-line copy built for one ISA could serve the files of another.
  __attribute__((always_inline)) int64_t tokens() const { return window_h * window_w; }
  __attribute__((always_inline)) int64_t windows() const { return batch * windows_y * windows_x; }
  __attribute__((always_inline)) int64_t channels() const { return heads * head_dim; }
  __attribute__((always_inline)) int64_t bias_bins() const {
    return (2 * window_h - 1) * (2 * window_w - 1);
  }
};

// A chunk of the backward: some windows, some heads. How a call is cut depends on its sizes alone,
// so the order of every sum does too.
struct IpsaChunk {
  int64_t window_begin, window_end;
  int64_t head_begin, head_end;
  void* grad_bias_bins;  // [heads, bins] of the compute type: this chunk's share, or null
  void* grad_pad;        // [3 * heads * head_dim] of the compute type, or null
};

// A whole block of inference, float32: `map` describes x [batch, height, width, C] in place of qkv.
struct IpsaBlockArgs {
  IpsaArgs map;
  const void *qkv_weight, *proj_weight;  // packed, see ipsa_block.h
  const void *qkv_bias, *proj_bias;      // or null
};

struct IpsaKernels {
  int64_t (*forward_scratch)(const IpsaArgs&);
  int64_t (*backward_scratch)(const IpsaArgs&, int64_t chunk_heads);
  // Units [begin, end) of windows x heads, the head fastest.
  void (*forward)(const IpsaArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const IpsaArgs&, const IpsaChunk&, void* scratch);
  int64_t (*block_scratch)(const IpsaBlockArgs&);
  void (*block)(const IpsaBlockArgs&, int64_t begin, int64_t end, void* scratch);  // of windows
  int64_t (*packed_size)(int64_t out_features, int64_t in_features);
  void (*pack_weight)(const float* weight, int64_t out_features, int64_t in_features,
                      float* packed);
};

}  // namespace xattn
