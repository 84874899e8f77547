// Digest-token attention on the CPU: checks, allocation, threads. The arithmetic is in
// digest_cpu_kernels.cpp.
#include "digest.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "digest_checks.h"

namespace xattn {

XATTN_SELECT_KERNELS(DigestKernels, digest_kernels)

namespace {

// The tensors of a call in the layout that the kernels read.
DigestTensors lay_out(DigestTensors in) {
  in.qkv = dense_last(in.qkv);
  if (in.digest_kv.has_value()) in.digest_kv = dense_last(*in.digest_kv);
  in.bias_table = contiguous_or_null(in.bias_table);
  in.digest_bias = contiguous_or_null(in.digest_bias);
  return in;
}

DigestArgs make_args(const DigestTensors& in, const DigestOptions& o) {
  DigestArgs a{};
  a.dtype = dtype_of(in.qkv);
  a.batch = in.batch();
  a.tokens = in.tokens();
  a.heads = o.heads;
  a.head_dim = in.channels() / o.heads;
  a.grid_h = o.grid_h;
  a.grid_w = o.grid_w;
  a.prefix = o.prefix;
  a.qkv = in.qkv.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.qkv_stride[i] = in.qkv.stride(i);
  a.digests = in.digests();
  a.digest_kv = data_or_null(in.digest_kv);
  for (int i = 0; i < 2 && in.digest_kv.has_value(); ++i) {
    a.digest_stride[i] = in.digest_kv->stride(i);
  }
  a.bias_table = data_or_null(in.bias_table);
  a.digest_bias = a.digests > 0 ? data_or_null(in.digest_bias) : nullptr;
  a.scale = o.scale;
  a.dropout_p = o.dropout_p;
  if (o.dropout_p > 0) read_seed(in.seed, a.dropout_key);
  return a;
}

Tensor empty_compute(const Tensor& like, std::vector<int64_t> sizes, const DigestArgs& a) {
  return empty_for(like, sizes, compute_type(a.dtype));
}

std::tuple<Tensor, Tensor> digest_fwd(Tensor qkv, std::optional<Tensor> digest_kv,
                                      std::optional<Tensor> bias_table,
                                      std::optional<Tensor> digest_bias, std::optional<Tensor> seed,
                                      int64_t heads, int64_t grid_h, int64_t grid_w, int64_t prefix,
                                      double scale, double dropout_p) {
  const DigestOptions options{heads, grid_h, grid_w, prefix, scale, dropout_p};
  DigestTensors in{qkv, digest_kv, bias_table, digest_bias, seed};
  check_digest(in, options);
  in = lay_out(in);
  DigestArgs a = make_args(in, options);
  Tensor out = empty_for(in.qkv, {a.batch, a.tokens, a.channels()});
  Tensor row_stats = empty_compute(in.qkv, {a.batch, a.heads, a.tokens, 2}, a);
  a.out = out.mutable_data_ptr();
  a.row_stats = row_stats.mutable_data_ptr();

  const DigestKernels& kernels = select_digest_kernels(a.dtype);
  const int64_t bytes = kernels.forward_scratch(a);
  torch::stable::parallel_for(0, kernels.forward_items(a), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.forward(a, begin, end, scratch.get());
  });
  return {out, row_stats};
}

// Where images and heads are few, their queries are split as well. It depends on sizes alone, so
// the order of every sum does too.
void set_splits(DigestArgs& a) {
  constexpr int64_t kItems = 16, kRows = 140;  // rows: a multiple of the tiles' heights
  const int64_t wanted = a.units() > 0 ? (kItems + a.units() - 1) / a.units() : 1;
  const int64_t rows = (a.tokens + wanted - 1) / wanted;
  a.split_rows = a.units() >= kItems ? a.tokens : (rows + kRows - 1) / kRows * kRows;
  a.splits = (a.tokens + a.split_rows - 1) / a.split_rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> digest_bwd(
    Tensor grad_out, Tensor qkv, std::optional<Tensor> digest_kv, std::optional<Tensor> bias_table,
    std::optional<Tensor> digest_bias, Tensor row_stats, std::optional<Tensor> seed, int64_t heads,
    int64_t grid_h, int64_t grid_w, int64_t prefix, double scale, double dropout_p) {
  const DigestOptions options{heads, grid_h, grid_w, prefix, scale, dropout_p};
  DigestTensors in{qkv, digest_kv, bias_table, digest_bias, seed};
  check_digest(in, options);
  check_digest_gradient(in, options, grad_out, row_stats);
  in = lay_out(in);
  DigestArgs a = make_args(in, options);
  grad_out = dense_last(grad_out);
  row_stats = torch::stable::contiguous(row_stats);
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  a.row_stats = const_cast<void*>(row_stats.const_data_ptr());

  const Tensor& like = in.qkv;
  Tensor grad_qkv = empty_for(like, {a.batch, a.tokens, 3 * a.channels()});
  Tensor grad_digest_kv = in.digest_kv.has_value()
                              ? empty_for(like, {a.batch, a.digests, 2 * a.channels()})
                              : empty_for(like, {0});
  a.grad_qkv = grad_qkv.mutable_data_ptr();
  a.grad_digest_kv = grad_digest_kv.mutable_data_ptr();

  set_splits(a);
  const DigestKernels& kernels = select_digest_kernels(a.dtype);
  const bool split = a.splits > 1, table = in.bias_table.has_value() && a.units() > 0;
  const bool bias = a.digest_bias != nullptr && a.units() > 0;
  Tensor key_parts = empty_compute(
      like, {split ? a.units() * a.splits : 0, split ? kernels.key_part_size(a) : 0}, a);
  Tensor table_parts =
      empty_compute(like, {table ? a.batch * a.splits : 0, a.heads, a.patches()}, a);
  Tensor digest_parts = empty_compute(like, {bias ? a.batch * a.splits : 0, a.heads, a.digests}, a);
  a.key_parts = split ? key_parts.mutable_data_ptr() : nullptr;
  a.table_parts = table ? table_parts.mutable_data_ptr() : nullptr;
  a.digest_parts = bias ? digest_parts.mutable_data_ptr() : nullptr;

  const int64_t bytes = kernels.backward_scratch(a);
  torch::stable::parallel_for(0, a.units() * a.splits, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.backward(a, begin, end, scratch.get());
  });
  if (split) {
    torch::stable::parallel_for(0, a.units(), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(a.keys() * static_cast<int64_t>(sizeof(uint32_t)));
      kernels.sum_key_parts(a, begin, end, scratch.get());
    });
  }
  // The gradient of a bias: shares added in order; zeros where there is none, none for None.
  const auto total = [&](const std::optional<Tensor>& of, Tensor parts) {
    if (!of.has_value()) return empty_for(like, {0});
    if (parts.numel() > 0) return sum_parts(parts, like);
    return torch::stable::new_zeros(*of, {of->size(0), of->size(1)});
  };
  return {grad_qkv, grad_digest_kv, total(in.bias_table, table_parts),
          total(in.digest_bias, digest_parts)};
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("digest_fwd", TORCH_BOX(&xattn::digest_fwd));
  m.impl("digest_bwd", TORCH_BOX(&xattn::digest_bwd));
}
