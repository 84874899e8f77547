// Cross-patch attention on the CPU: checks, allocation, threads. The arithmetic is in the
// *_cpu_kernels.cpp files.
#include "cpsa.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "cpsa_checks.h"

namespace xattn {

XATTN_SELECT_KERNELS(CpsaForm, cpsa_absorbed)
XATTN_SELECT_KERNELS(CpsaForm, cpsa_direct)

namespace {

using OptionalTensor = std::optional<Tensor>;

CpsaArgs make_args(const CpsaTensors& in, const CpsaOptions& o) {
  CpsaArgs a{};
  a.dtype = dtype_of(in.x);
  a.batch = in.x.size(0);
  a.height = in.x.size(1);
  a.width = in.x.size(2);
  a.channels = in.x.size(3);
  a.patch_h = o.patch_h;
  a.patch_w = o.patch_w;
  a.elements = o.pixels();
  a.patches_y = (a.height + o.patch_h - 1) / o.patch_h;
  a.patches_x = (a.width + o.patch_w - 1) / o.patch_w;
  a.patches = a.patches_y * a.patches_x;
  a.heads = o.heads;
  a.scale = o.scale;
  a.dropout_p = o.dropout_p;
  if (o.dropout_p > 0) read_seed(in.seed, a.dropout_key);
  a.x = in.x.const_data_ptr();
  for (int i = 0; i < 3; ++i) a.x_stride[i] = in.x.stride(i);
  a.qkv_weight = in.qkv_weight.const_data_ptr();
  a.qkv_bias = data_or_null(in.qkv_bias);
  a.proj_weight = in.proj_weight.const_data_ptr();
  a.proj_bias = data_or_null(in.proj_bias);
  return a;
}

const CpsaKernels& kernels_for(const CpsaArgs& a) {
  // A single token's softmax is 1 whatever the number of heads.
  const bool absorbs = a.dropout_p == 0 && (a.heads == 1 || a.patches == 1);
  const CpsaForm& form = absorbs ? select_cpsa_absorbed(a.dtype) : select_cpsa_direct(a.dtype);
  return *form.kernels(a.dtype);
}

Tensor new_like(const Tensor& t) {
  return empty_for(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
}

Tensor cpsa_fwd(Tensor x, Tensor qkv_weight, OptionalTensor qkv_bias, Tensor proj_weight,
                OptionalTensor proj_bias, OptionalTensor seed, int64_t patch_h, int64_t patch_w,
                int64_t heads, double scale, double dropout_p) {
  const CpsaOptions options{patch_h, patch_w, heads, scale, dropout_p};
  CpsaTensors in{x, qkv_weight, proj_weight, qkv_bias, proj_bias, seed};
  check_cpsa(in, options);
  in.lay_out();
  CpsaArgs a = make_args(in, options);
  Tensor out = new_like(in.x);
  a.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;

  const CpsaKernels& kernels = kernels_for(a);
  const CpsaPlan plan = kernels.plan(a, CpsaPass::kForward);
  // With few images and channels the queries of a bundle are shared out too: some items for each
  // thread, each of at least two blocks, since every item gathers all keys.
  const int64_t wanted = 4 * torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, plan.query_blocks / 2);
  a.query_ranges = std::clamp<int64_t>((wanted + plan.bundles - 1) / plan.bundles, 1, most);

  const Scratch weights(plan.weights_bytes);
  kernels.prepare(a, CpsaPass::kForward, weights.get());
  const int64_t items = plan.bundles * a.query_ranges;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(plan.scratch_bytes);
    kernels.forward(a, weights.get(), begin, end, scratch.get());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpsa_bwd(
    Tensor grad_out, Tensor x, Tensor qkv_weight, OptionalTensor qkv_bias, Tensor proj_weight,
    OptionalTensor proj_bias, OptionalTensor seed, int64_t patch_h, int64_t patch_w, int64_t heads,
    double scale, double dropout_p) {
  const CpsaOptions options{patch_h, patch_w, heads, scale, dropout_p};
  CpsaTensors in{x, qkv_weight, proj_weight, qkv_bias, proj_bias, seed};
  check_cpsa(in, options);
  check_cpsa_gradient(in, grad_out);
  in.lay_out();
  CpsaArgs a = make_args(in, options);
  grad_out = dense_last(grad_out);
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 3; ++i) a.grad_out_stride[i] = grad_out.stride(i);

  Tensor grad_x = new_like(in.x);
  const bool empty = grad_x.numel() == 0;
  const auto new_gradient = [&](const OptionalTensor& of, void*& data) {
    if (!of.has_value()) return empty_for(in.x, {0});
    Tensor grad = new_like(*of);
    if (empty) torch::stable::zero_(grad);
    data = grad.mutable_data_ptr();
    return grad;
  };
  a.out = grad_x.mutable_data_ptr();
  Tensor grad_qkv_weight = new_gradient(in.qkv_weight, a.grad_qkv_weight);
  Tensor grad_qkv_bias = new_gradient(in.qkv_bias, a.grad_qkv_bias);
  Tensor grad_proj_weight = new_gradient(in.proj_weight, a.grad_proj_weight);
  Tensor grad_proj_bias = new_gradient(in.proj_bias, a.grad_proj_bias);
  const auto result =
      std::make_tuple(grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias);
  if (empty) return result;

  const CpsaKernels& kernels = kernels_for(a);
  const CpsaPlan plan = kernels.plan(a, CpsaPass::kBackward);
  const Scratch weights(plan.weights_bytes);
  kernels.prepare(a, CpsaPass::kBackward, weights.get());
  // Each part has sums of its own. Their number depends on the shape alone, so that the order of
  // every sum does too.
  const int64_t parts = std::min<int64_t>(plan.bundles, 64);
  const Scratch sums(parts * plan.sums_bytes);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(plan.scratch_bytes);
    for (int64_t part = begin; part < end; ++part) {
      char* own = static_cast<char*>(sums.get()) + part * plan.sums_bytes;
      std::fill(own, own + plan.sums_bytes, 0);
      kernels.backward(a, weights.get(), part * plan.bundles / parts,
                       (part + 1) * plan.bundles / parts, own, scratch.get());
    }
  });
  kernels.finish(a, weights.get(), sums.get(), parts);
  return result;
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("cpsa_fwd", TORCH_BOX(&xattn::cpsa_fwd));
  m.impl("cpsa_bwd", TORCH_BOX(&xattn::cpsa_bwd));
}
