// Digest-token attention (CabViT, section 3.1): what host and kernels of the CPU agree on.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace xattn {

// One call. Queries are the tokens of an image; keys are its tokens, then its digests. The first
// `prefix` tokens lie outside the grid. Channels are dense; strides, in elements, are those of the
// batch and of the tokens.
struct DigestArgs {
  Dtype dtype;
  int64_t batch, tokens, digests;
  int64_t heads, head_dim;
  int64_t grid_h, grid_w, prefix;  // tokens = prefix + grid_h * grid_w

  const void* qkv;  // (3, heads, head_dim) in the last dimension
  int64_t qkv_stride[2];
  const void* digest_kv;  // (2, heads, head_dim) in the last dimension; unused without digests
  int64_t digest_stride[2];
  const void* bias_table;   // [heads, grid_h * grid_w], by |dy| * grid_w + |dx|, or null
  const void* digest_bias;  // [heads, digests], or null
  double scale;
  double dropout_p;
  uint32_t dropout_key[2];

  void* out;        // [batch, tokens, heads * head_dim], contiguous
  void* row_stats;  // [batch, heads, tokens, 2] of the compute type: see kStats in digest_unit.h

  // Backward only.
  const void* grad_out;
  int64_t grad_out_stride[2];
  void *grad_qkv, *grad_digest_kv;  // contiguous
  // An image and head may be cut into `splits` ranges of `split_rows` queries. Each has its share
  // of the gradients that sum over queries, of the compute type:
  int64_t splits, split_rows;
  void* key_parts;     // [heads, batch, splits, key_part_size] dK and dV; null if splits is 1
  void* table_parts;   // [batch, splits, heads, grid_h * grid_w], or null
  void* digest_parts;  // [batch, splits, heads, digests], or null

  // Always inline: an out-of-line copy built for one ISA could serve the files of another.
  __attribute__((always_inline)) int64_t channels() const { return heads * head_dim; }
  __attribute__((always_inline)) int64_t patches() const { return grid_h * grid_w; }
  __attribute__((always_inline)) int64_t keys() const { return tokens + digests; }
  __attribute__((always_inline)) int64_t units() const { return batch * heads; }
};

struct DigestKernels {
  int64_t (*forward_scratch)(const DigestArgs&);
  int64_t (*backward_scratch)(const DigestArgs&);
  // Items are blocks of queries of one image and head: images inside heads, blocks inside images.
  int64_t (*forward_items)(const DigestArgs&);
  void (*forward)(const DigestArgs&, int64_t begin, int64_t end, void* scratch);
  // Items are [heads, batch, splits].
  void (*backward)(const DigestArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*key_part_size)(const DigestArgs&);
  // With several splits: adds up `key_parts` of units [begin, end), heads outside, and writes dK
  // and dV; its scratch holds one uint32 a key.
  void (*sum_key_parts)(const DigestArgs&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace xattn
