// Cross-patch attention (CAT, section 3.1.2): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace xattn {

// One call. Activations are [batch, height, width, channels] with dense channels; strides are in
// elements. A token is one channel's patch, flattened row-major (`elements` values); the patches of
// one channel attend to each other. Patches that stick out of the map are filled with zeros.
struct CpsaArgs {
  Dtype dtype;
  int64_t batch, height, width, channels;
  int64_t patch_h, patch_w;
  int64_t elements;              // of a patch: patch_h * patch_w
  int64_t patches_y, patches_x;  // of the padded map
  int64_t patches;               // patches_y * patches_x
  int64_t heads;
  double scale;
  double dropout_p;
  uint32_t dropout_key[2];

  const void* x;
  int64_t x_stride[3];
  const void* qkv_weight;   // [3 * elements, elements], rows laid out (3, heads, elements / heads)
  const void* qkv_bias;     // [3 * elements], or null
  const void* proj_weight;  // [elements, elements]
  const void* proj_bias;    // [elements], or null

  void* out;  // forward: the result, backward: the gradient of x; contiguous
  // Into how many ranges of queries the forward cuts the patches of one channel group.
  int64_t query_ranges;

  // Backward only. Contiguous, of the shapes of what they are gradients of; null where that is.
  const void* grad_out;
  int64_t grad_out_stride[3];
  void* grad_qkv_weight;
  void* grad_qkv_bias;
  void* grad_proj_weight;
  void* grad_proj_bias;
};

enum class CpsaPass { kForward, kBackward };

// How a pass is cut into bundles of work and what memory it takes. It depends on the sizes of the
// call and on the ISA, never on the number of threads.
struct CpsaPlan {
  int64_t bundles;        // some groups of channels of some images; independent of each other
  int64_t query_blocks;   // forward: into how many query ranges a bundle may be cut
  int64_t weights_bytes;  // of the prepared weights
  int64_t scratch_bytes;  // of one thread
  int64_t sums_bytes;     // backward: of one set of partial sums of the weight gradients
};

struct CpsaKernels {
  CpsaPlan (*plan)(const CpsaArgs&, CpsaPass);
  // Brings the weights into the form in which the pass reads them.
  void (*prepare)(const CpsaArgs&, CpsaPass, void* weights);
  // Items [begin, end) of bundles x query ranges, the range fastest.
  void (*forward)(const CpsaArgs&, const void* weights, int64_t begin, int64_t end, void* scratch);
  // Bundles [begin, end): writes their part of the gradient of x and their partial sums.
  void (*backward)(const CpsaArgs&, const void* weights, int64_t begin, int64_t end, void* sums,
                   void* scratch);
  // Adds `count` sets of partial sums, in their order, and writes the weight gradients. Both
  // memories are used up.
  void (*finish)(const CpsaArgs&, void* weights, void* sums, int64_t count);
};

// The kernels of one form of the attention.
//   absorbed: one head, no dropout. Wq^T Wk and Wv^T Wo^T are multiplied out beforehand; keys and
//             values are then x itself.
//   direct:   any number of heads, dropout. Queries, keys and values are computed.
struct CpsaForm {
  const CpsaKernels* (*kernels)(Dtype);
};

}  // namespace xattn
