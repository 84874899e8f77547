// Inner-patch attention: the options of a call on any backend, and what its tensors must be.
#pragma once

#include "common/checks.h"

namespace xattn {

struct IpsaOptions {
  int64_t heads, window_h, window_w, shift_h, shift_w;
  double scale, dropout_p;
};

// map: [B, H, W, parts * heads * head_dim].
inline void check_ipsa_map(const IpsaOptions& o, const Tensor& map, int64_t parts,
                           const std::optional<Tensor>& bias_table) {
  dtype_of(map);
  STD_TORCH_CHECK(map.dim() == 4, "ipsa: the map must be [B, H, W, channels]");
  STD_TORCH_CHECK(o.heads > 0 && map.size(3) > 0 && map.size(3) % (parts * o.heads) == 0,
                  "ipsa: num_heads must divide the channels");
  STD_TORCH_CHECK(o.window_h > 0 && o.window_w > 0 && o.window_h <= INT32_MAX / 4 / o.window_w,
                  "ipsa: window must be positive, of less than 2^29 tokens");
  STD_TORCH_CHECK(
      0 <= o.shift_h && o.shift_h < o.window_h && 0 <= o.shift_w && o.shift_w < o.window_w,
      "ipsa: shift must be in [0, window)");
  const int64_t bins = (2 * o.window_h - 1) * (2 * o.window_w - 1);
  STD_TORCH_CHECK(fits(bias_table, {bins, o.heads}, map.scalar_type()),
                  "ipsa: bias_table must be [(2h-1)(2w-1), heads] of the map's dtype");
}

inline void check_ipsa(const IpsaOptions& o, const Tensor& qkv,
                       const std::optional<Tensor>& bias_table,
                       const std::optional<Tensor>& pad_qkv, const std::optional<Tensor>& seed) {
  check_ipsa_map(o, qkv, 3, bias_table);
  STD_TORCH_CHECK(fits(pad_qkv, {qkv.size(3)}, qkv.scalar_type()),
                  "ipsa: pad_qkv must be [3C] of qkv's dtype");
  check_seed(seed, o.dropout_p);
}

inline void check_ipsa_gradient(const Tensor& qkv, const Tensor& grad_out) {
  STD_TORCH_CHECK(
      fits(grad_out, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv.scalar_type()),
      "ipsa: grad_out must have the shape and dtype of the output");
}

}  // namespace xattn
