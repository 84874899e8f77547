// Inner-patch attention on the CPU: checks, allocation, threads. The arithmetic is in
// ipsa_cpu_kernels.cpp.
#include "ipsa.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "ipsa_checks.h"

namespace xattn {

XATTN_SELECT_KERNELS(IpsaKernels, ipsa_kernels)

namespace {

// Sizes and windows of a call on `map`, [B, H, W, parts * heads * head_dim].
IpsaArgs make_geometry(const Tensor& map, int64_t parts, const IpsaOptions& o) {
  IpsaArgs a{};
  a.dtype = dtype_of(map);
  a.batch = map.size(0);
  a.height = map.size(1);
  a.width = map.size(2);
  a.heads = o.heads;
  a.head_dim = map.size(3) / (parts * o.heads);
  a.window_h = o.window_h;
  a.window_w = o.window_w;
  a.shift_h = o.shift_h;
  a.shift_w = o.shift_w;
  a.windows_y = (a.height + o.window_h - 1) / o.window_h;
  a.windows_x = (a.width + o.window_w - 1) / o.window_w;
  a.qkv = map.const_data_ptr();
  for (int i = 0; i < 3; ++i) a.qkv_stride[i] = map.stride(i);
  a.out_pixel = a.channels();
  a.scale = o.scale;
  a.dropout_p = o.dropout_p;
  return a;
}

IpsaArgs make_args(const Tensor& qkv, const std::optional<Tensor>& bias_table,
                   const std::optional<Tensor>& pad_qkv, const std::optional<Tensor>& seed,
                   const IpsaOptions& o) {
  IpsaArgs a = make_geometry(qkv, 3, o);
  a.bias_table = data_or_null(bias_table);
  a.pad_qkv = data_or_null(pad_qkv);
  if (o.dropout_p > 0) read_seed(seed, a.dropout_key);
  return a;
}

Tensor ipsa_fwd(Tensor qkv, std::optional<Tensor> bias_table, std::optional<Tensor> pad_qkv,
                std::optional<Tensor> seed, int64_t heads, int64_t window_h, int64_t window_w,
                int64_t shift_h, int64_t shift_w, double scale, double dropout_p) {
  const IpsaOptions options{heads, window_h, window_w, shift_h, shift_w, scale, dropout_p};
  check_ipsa(options, qkv, bias_table, pad_qkv, seed);
  qkv = dense_last(qkv);
  bias_table = contiguous_or_null(bias_table);
  pad_qkv = contiguous_or_null(pad_qkv);
  IpsaArgs a = make_args(qkv, bias_table, pad_qkv, seed, options);
  Tensor out = empty_for(qkv, {a.batch, a.height, a.width, a.channels()});
  a.out = out.mutable_data_ptr();

  const IpsaKernels& kernels = select_ipsa_kernels(a.dtype);
  const int64_t bytes = kernels.forward_scratch(a);
  torch::stable::parallel_for(0, a.windows() * a.heads, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.forward(a, begin, end, scratch.get());
  });
  return out;
}

// Enough chunks for many cores, heads together where there are windows enough: a chunk pays once
// for folding its bias gradient into the bins, so it should hold several windows.
struct Chunking {
  int64_t windows, heads;  // how many pieces each dimension is cut into

  explicit Chunking(const IpsaArgs& a) {
    constexpr int64_t kChunks = 64, kWindowsPerChunk = 8;
    windows = std::clamp<int64_t>(a.windows() / kWindowsPerChunk, 1, kChunks);
    heads = std::min(a.heads, (kChunks + windows - 1) / windows);
  }
  int64_t count() const { return windows * heads; }
};

std::tuple<Tensor, Tensor, Tensor> ipsa_bwd(Tensor grad_out, Tensor qkv,
                                            std::optional<Tensor> bias_table,
                                            std::optional<Tensor> pad_qkv,
                                            std::optional<Tensor> seed, int64_t heads,
                                            int64_t window_h, int64_t window_w, int64_t shift_h,
                                            int64_t shift_w, double scale, double dropout_p) {
  const IpsaOptions options{heads, window_h, window_w, shift_h, shift_w, scale, dropout_p};
  check_ipsa(options, qkv, bias_table, pad_qkv, seed);
  check_ipsa_gradient(qkv, grad_out);
  qkv = dense_last(qkv);
  grad_out = dense_last(grad_out);
  bias_table = contiguous_or_null(bias_table);
  pad_qkv = contiguous_or_null(pad_qkv);
  IpsaArgs a = make_args(qkv, bias_table, pad_qkv, seed, options);
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 3; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  Tensor grad_qkv = empty_for(qkv, {a.batch, a.height, a.width, 3 * a.channels()});
  a.grad_qkv = grad_qkv.mutable_data_ptr();

  const Chunking cut(a);
  const auto compute = compute_type(a.dtype);
  const int64_t value_bytes = compute_bytes(a.dtype);
  const int64_t bin_count = bias_table.has_value() ? a.heads * a.bias_bins() : 0;
  const int64_t pad_count = pad_qkv.has_value() ? 3 * a.channels() : 0;
  // [chunks, heads, bins] and [chunks, 3C]; with several head groups each row is partly zero.
  Tensor bins = torch::stable::new_zeros(
      qkv,
      std::vector<int64_t>{cut.windows, bin_count ? a.heads : 0, bin_count ? a.bias_bins() : 0},
      compute);
  Tensor pads =
      torch::stable::new_zeros(qkv, std::vector<int64_t>{cut.windows, pad_count}, compute);
  auto* bins_data = static_cast<char*>(bins.mutable_data_ptr());
  auto* pads_data = static_cast<char*>(pads.mutable_data_ptr());

  const IpsaKernels& kernels = select_ipsa_kernels(a.dtype);
  const int64_t chunk_heads = (a.heads + cut.heads - 1) / cut.heads;
  const int64_t bytes = kernels.backward_scratch(a, chunk_heads);
  const int64_t chunks = a.windows() > 0 ? cut.count() : 0;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t w = i / cut.heads, h = i % cut.heads;
      IpsaChunk chunk{w * a.windows() / cut.windows,
                      (w + 1) * a.windows() / cut.windows,
                      h * a.heads / cut.heads,
                      (h + 1) * a.heads / cut.heads,
                      nullptr,
                      nullptr};
      if (bin_count) chunk.grad_bias_bins = bins_data + w * bin_count * value_bytes;
      if (pad_count) chunk.grad_pad = pads_data + w * pad_count * value_bytes;
      kernels.backward(a, chunk, scratch.get());
    }
  });
  Tensor grad_table = empty_for(qkv, {0}), grad_pad = empty_for(qkv, {0});
  if (bin_count) {
    grad_table = torch::stable::contiguous(torch::stable::transpose(sum_parts(bins, qkv), 0, 1));
  }
  if (pad_count) grad_pad = sum_parts(pads, qkv);
  return {grad_qkv, grad_table, grad_pad};
}

// A linear weight [N, K] in the layout that ipsa_block_fwd reads; it depends on the active ISA.
Tensor ipsa_pack_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && dtype_of(weight) == Dtype::kFloat32,
                  "ipsa: a packed weight must be [N, K] float32");
  weight = torch::stable::contiguous(weight);
  const IpsaKernels& kernels = select_ipsa_kernels(Dtype::kFloat32);
  Tensor packed = empty_for(weight, {kernels.packed_size(weight.size(0), weight.size(1))});
  kernels.pack_weight(weight.const_data_ptr<float>(), weight.size(0), weight.size(1),
                      packed.mutable_data_ptr<float>());
  return packed;
}

Tensor ipsa_block_fwd(Tensor x, Tensor qkv_packed, std::optional<Tensor> qkv_bias,
                      Tensor proj_packed, std::optional<Tensor> proj_bias,
                      std::optional<Tensor> bias_table, int64_t heads, int64_t window_h,
                      int64_t window_w, int64_t shift_h, int64_t shift_w, double scale) {
  const IpsaOptions options{heads, window_h, window_w, shift_h, shift_w, scale, 0.0};
  check_ipsa_map(options, x, 1, bias_table);
  x = dense_last(x);
  bias_table = contiguous_or_null(bias_table);
  qkv_bias = contiguous_or_null(qkv_bias);
  proj_bias = contiguous_or_null(proj_bias);
  IpsaBlockArgs block{};
  block.map = make_geometry(x, 1, options);
  IpsaArgs& a = block.map;
  const int64_t C = a.channels();
  const IpsaKernels& kernels = select_ipsa_kernels(a.dtype);
  STD_TORCH_CHECK(a.dtype == Dtype::kFloat32, "ipsa: a block must be float32");
  STD_TORCH_CHECK(
      qkv_packed.is_contiguous() && qkv_packed.numel() == kernels.packed_size(3 * C, C) &&
          proj_packed.is_contiguous() && proj_packed.numel() == kernels.packed_size(C, C),
      "ipsa: weights must come from ipsa_pack_weight, [3C, C] and [C, C]");
  STD_TORCH_CHECK((!qkv_bias.has_value() || qkv_bias->numel() == 3 * C) &&
                      (!proj_bias.has_value() || proj_bias->numel() == C),
                  "ipsa: biases must be [3C] and [C]");
  a.bias_table = data_or_null(bias_table);
  Tensor out = empty_for(x, {a.batch, a.height, a.width, C});
  a.out = out.mutable_data_ptr();
  block.qkv_weight = qkv_packed.const_data_ptr();
  block.proj_weight = proj_packed.const_data_ptr();
  block.qkv_bias = data_or_null(qkv_bias);
  block.proj_bias = data_or_null(proj_bias);

  const int64_t bytes = kernels.block_scratch(block);
  torch::stable::parallel_for(0, a.windows(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.block(block, begin, end, scratch.get());
  });
  return out;
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("ipsa_fwd", TORCH_BOX(&xattn::ipsa_fwd));
  m.impl("ipsa_bwd", TORCH_BOX(&xattn::ipsa_bwd));
  m.impl("ipsa_pack_weight", TORCH_BOX(&xattn::ipsa_pack_weight));
  m.impl("ipsa_block_fwd", TORCH_BOX(&xattn::ipsa_block_fwd));
}
