// CLS-query cross attention on the CPU: checks, allocation, threads. The arithmetic is in
// clsattn_cpu_kernels.cpp.
#include "clsattn.h"

#include <algorithm>
#include <tuple>

#include "clsattn_checks.h"
#include "common/isa.h"

namespace xattn {

XATTN_SELECT_KERNELS(ClsAttnKernels, clsattn_kernels)

namespace {

using Optional = std::optional<Tensor>;

ClsAttnArgs make_args(const ClsAttnTensors& in, const ClsAttnOptions& o) {
  ClsAttnArgs a{};
  a.dtype = dtype_of(in.cls);
  a.batch = in.cls.size(0);
  a.tokens = 1 + in.patches.size(1);
  a.heads = o.heads;
  a.head_dim = in.cls.size(2) / o.heads;
  a.eps = o.eps;
  a.scale = o.scale;
  a.dropout_p = o.dropout_p;
  if (o.dropout_p > 0) read_seed(in.seed, a.dropout_key);
  // Where images are few, their tokens are split. It depends on sizes alone, so the order of every
  // sum does too.
  constexpr int64_t kUnits = 8, kTokens = 64;
  const int64_t wanted = a.batch > 0 ? (kUnits + a.batch - 1) / a.batch : 1;
  a.parts = std::clamp<int64_t>(a.tokens / kTokens, 1, wanted);

  a.cls = in.cls.const_data_ptr();
  a.cls_stride = in.cls.stride(0);
  a.patches = in.patches.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.patches_stride[i] = in.patches.stride(i);
  a.q_weight = in.q_weight.const_data_ptr();
  a.k_weight = in.k_weight.const_data_ptr();
  a.v_weight = in.v_weight.const_data_ptr();
  a.q_bias = data_or_null(in.q_bias);
  a.v_bias = data_or_null(in.v_bias);
  a.norm_weight = data_or_null(in.norm_weight);
  a.norm_bias = data_or_null(in.norm_bias);
  return a;
}

// Stages [first, last), each on all threads.
void run_stages(ClsAttnArgs& a, ClsAttnStage first, ClsAttnStage last) {
  const ClsAttnKernels& kernels = select_clsattn_kernels(a.dtype);
  Scratch workspace(kernels.workspace(a));
  a.workspace = workspace.get();
  for (int i = static_cast<int>(first); i < static_cast<int>(last); ++i) {
    const auto stage = static_cast<ClsAttnStage>(i);
    const int64_t items = kernels.items(a, stage), bytes = kernels.scratch(a, stage);
    torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes);
      kernels.run(a, stage, begin, end, scratch.get());
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> clsattn_fwd(Tensor cls, Tensor patches, Tensor q_weight,
                                               Optional q_bias, Tensor k_weight, Tensor v_weight,
                                               Optional v_bias, Optional norm_weight,
                                               Optional norm_bias, Optional seed, int64_t heads,
                                               double eps, double scale, double dropout_p) {
  const ClsAttnOptions options{heads, eps, scale, dropout_p};
  ClsAttnTensors in{cls,    patches, q_weight,    k_weight,  v_weight,
                    q_bias, v_bias,  norm_weight, norm_bias, seed};
  check_clsattn(in, options);
  in.lay_out(dense_last);
  ClsAttnArgs a = make_args(in, options);
  Tensor out = empty_for(in.cls, {a.batch, 1, a.channels()});
  Tensor head_state = empty_for(in.cls, in.head_sizes(options), compute_type(a.dtype));
  Tensor token_state = empty_for(in.cls, in.token_sizes(options), compute_type(a.dtype));
  a.out = out.mutable_data_ptr();
  a.head_state = head_state.mutable_data_ptr();
  a.token_state = token_state.mutable_data_ptr();
  run_stages(a, ClsAttnStage::kToken, ClsAttnStage::kForward);
  return {out, head_state, token_state};
}

using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors clsattn_bwd(Tensor grad_out, Tensor cls, Tensor patches, Tensor q_weight,
                        Optional q_bias, Tensor k_weight, Tensor v_weight, Optional v_bias,
                        Optional norm_weight, Optional norm_bias, Tensor head_state,
                        Tensor token_state, Optional seed, int64_t heads, double eps, double scale,
                        double dropout_p) {
  const ClsAttnOptions options{heads, eps, scale, dropout_p};
  ClsAttnTensors in{cls,    patches, q_weight,    k_weight,  v_weight,
                    q_bias, v_bias,  norm_weight, norm_bias, seed};
  check_clsattn(in, options);
  check_clsattn_gradient(in, options, grad_out, head_state, token_state);
  in.lay_out(dense_last);
  ClsAttnArgs a = make_args(in, options);
  grad_out = dense_last(grad_out);
  a.grad_out = grad_out.const_data_ptr();
  a.grad_out_stride = grad_out.stride(0);
  head_state = torch::stable::contiguous(head_state);
  token_state = torch::stable::contiguous(token_state);
  a.head_state = const_cast<void*>(head_state.const_data_ptr());
  a.token_state = const_cast<void*>(token_state.const_data_ptr());

  const int64_t channels = a.channels();
  const auto empty = [&](bool there, std::vector<int64_t> sizes, void*& data) {
    Tensor t = empty_for(in.cls, there ? sizes : std::vector<int64_t>{0});
    data = there ? t.mutable_data_ptr() : nullptr;
    return t;
  };
  Tensor grad_cls = empty(true, {a.batch, 1, channels}, a.grad_cls);
  Tensor grad_patches = empty(true, {a.batch, a.tokens - 1, channels}, a.grad_patches);
  Tensor grad_q = empty(true, {channels, channels}, a.grad_q_weight);
  Tensor grad_q_bias = empty(in.q_bias.has_value(), {channels}, a.grad_q_bias);
  Tensor grad_k = empty(true, {channels, channels}, a.grad_k_weight);
  Tensor grad_v = empty(true, {channels, channels}, a.grad_v_weight);
  Tensor grad_v_bias = empty(in.v_bias.has_value(), {channels}, a.grad_v_bias);
  Tensor grad_weight = empty(in.norm_weight.has_value(), {channels}, a.grad_norm_weight);
  Tensor grad_bias = empty(in.norm_bias.has_value(), {channels}, a.grad_norm_bias);
  run_stages(a, ClsAttnStage::kGradToken, ClsAttnStage::kBackward);
  return {grad_cls, grad_patches, grad_q,      grad_q_bias, grad_k,
          grad_v,   grad_v_bias,  grad_weight, grad_bias};
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("clsattn_fwd", TORCH_BOX(&xattn::clsattn_fwd));
  m.impl("clsattn_bwd", TORCH_BOX(&xattn::clsattn_bwd));
}
