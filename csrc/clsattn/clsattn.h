// CLS-query cross attention (CrossViT, section 3.3): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace xattn {

// One call. Activations have dense channels; strides are in elements. Weights are contiguous
// [C, C], C = heads * head_dim; a null bias or norm is none.
struct ClsAttnArgs {
  Dtype dtype;
  int64_t batch, tokens;  // tokens: CLS and the patches
  int64_t heads, head_dim;
  int64_t parts;  // into which the tokens of an image are cut
  double eps, scale, dropout_p;
  uint32_t dropout_key[2];

  const void *cls, *patches;
  int64_t cls_stride, patches_stride[2];
  const void *q_weight, *q_bias, *k_weight, *v_weight, *v_bias, *norm_weight, *norm_bias;

  // Of the compute type. With t the tokens that the LayerNorm made, before its weight and shift:
  // head_state [batch, heads, D + 2C]: q with its bias, u = scale q W_k of the head, and
  // sum_t w_t t after dropout; token_state [batch, heads (+ 2), tokens]: the softmax before
  // dropout, then with a norm each token's mean and 1 / deviation.
  void *head_state, *token_state;
  void* workspace;  // what the stages hand on
  void* out;        // [batch, 1, C]

  // Backward only: grad_out is null in the forward. Gradients are contiguous, null where the input
  // is.
  const void* grad_out;
  int64_t grad_out_stride;
  void *grad_cls, *grad_patches, *grad_q_weight, *grad_q_bias, *grad_k_weight, *grad_v_weight;
  void *grad_v_bias, *grad_norm_weight, *grad_norm_bias;

  __attribute__((always_inline)) int64_t channels() const { return heads * head_dim; }
};

// The work in order; each stage needs all items of those before it.
enum class ClsAttnStage {
  kToken,    // images: CLS through the norm
  kQuery,    // heads: q and u
  kPool,     // images x parts: softmax and weighted sum of the tokens
  kJoin,     // images: the sums of the parts
  kOutput,   // heads: W_v
  kForward,  // how many

  kGradToken = kForward,  // images: CLS and grad_out as the compute type
  kGradPooled,            // heads: the gradient of the weighted sums
  kGradWeights,           // images x parts: of the softmax weights
  kGradPatches,           // images x parts
  kGradJoin,              // images: the sums of the parts
  kGradHeads,             // heads: of q, W_k, W_v
  kGradQuery,             // chunks of channels: of W_q, and of CLS by way of the query
  kGradNorm,              // images: of CLS; vectors of channels: of the norm
  kBackward
};

struct ClsAttnKernels {
  int64_t (*workspace)(const ClsAttnArgs&);
  int64_t (*scratch)(const ClsAttnArgs&, ClsAttnStage);
  int64_t (*items)(const ClsAttnArgs&, ClsAttnStage);
  void (*run)(const ClsAttnArgs&, ClsAttnStage, int64_t begin, int64_t end, void* scratch);
};

}  // namespace xattn
