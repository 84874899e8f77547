// Digest-token attention: the arguments of a call on any backend, and what they must be.
#pragma once

#include "common/checks.h"

namespace xattn {

struct DigestOptions {
  int64_t heads, grid_h, grid_w, prefix;
  double scale, dropout_p;
};

struct DigestTensors {
  Tensor qkv;
  std::optional<Tensor> digest_kv, bias_table, digest_bias, seed;

  int64_t batch() const { return qkv.size(0); }
  int64_t tokens() const { return qkv.size(1); }
  int64_t channels() const { return qkv.size(2) / 3; }
  int64_t digests() const { return digest_kv.has_value() ? digest_kv->size(1) : 0; }
};

inline void check_digest(const DigestTensors& in, const DigestOptions& o) {
  const auto dtype = in.qkv.scalar_type();
  dtype_of(in.qkv);
  STD_TORCH_CHECK(in.qkv.dim() == 3, "digest: qkv must be [B, N, 3C]");
  STD_TORCH_CHECK(o.heads > 0 && in.qkv.size(2) > 0 && in.qkv.size(2) % (3 * o.heads) == 0,
                  "digest: num_heads must divide the channels");
  STD_TORCH_CHECK(holds_image(in.qkv, o.prefix, o.grid_h, o.grid_w),
                  "digest: qkv must have num_prefix_tokens + grid_h * grid_w tokens");
  STD_TORCH_CHECK(!in.digest_kv.has_value() ||
                      (in.digest_kv->dim() == 3 &&
                       fits(in.digest_kv, {in.batch(), in.digests(), 2 * in.channels()}, dtype)),
                  "digest: digest_kv must be [B, M, 2C] of qkv's batch and dtype");
  STD_TORCH_CHECK(in.tokens() + in.digests() <= INT32_MAX, "digest: more than 2^31 keys");
  STD_TORCH_CHECK(fits(in.bias_table, {o.heads, o.grid_h * o.grid_w}, dtype),
                  "digest: bias_table must be [heads, grid_h * grid_w] of qkv's dtype");
  STD_TORCH_CHECK(fits(in.digest_bias, {o.heads, in.digests()}, dtype),
                  "digest: digest_bias must be [heads, M] of qkv's dtype");
  check_seed(in.seed, o.dropout_p);
}

inline void check_digest_gradient(const DigestTensors& in, const DigestOptions& o,
                                  const Tensor& grad_out, const Tensor& row_stats) {
  STD_TORCH_CHECK(fits(grad_out, {in.batch(), in.tokens(), in.channels()}, in.qkv.scalar_type()),
                  "digest: grad_out must have the shape and dtype of the output");
  STD_TORCH_CHECK(
      fits(row_stats, {in.batch(), o.heads, in.tokens(), 2}, compute_type(dtype_of(in.qkv))),
      "digest: row_stats must be what digest_fwd returned");
}

}  // namespace xattn
