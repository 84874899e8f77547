// CLS-query cross attention on the CPU: checks, allocation, threads. The arithmetic is in
// clsattn_cpu_kernels.cpp.
#include "clsattn.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"

namespace xattn {

XATTN_SELECT_KERNELS(ClsAttnKernels, clsattn_kernels)

namespace {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

struct Options {
  int64_t heads;
  double eps, scale, dropout_p;
};

// The tensors of a call in the layout that the kernels read.
struct Inputs {
  Tensor cls, patches, q_weight, k_weight, v_weight;
  Optional q_bias, v_bias, norm_weight, norm_bias;

  Inputs(const Tensor& cls, const Tensor& patches, const Tensor& q_weight, const Optional& q_bias,
         const Tensor& k_weight, const Tensor& v_weight, const Optional& v_bias,
         const Optional& norm_weight, const Optional& norm_bias)
      : cls(dense_last(cls)),
        patches(dense_last(patches)),
        q_weight(torch::stable::contiguous(q_weight)),
        k_weight(torch::stable::contiguous(k_weight)),
        v_weight(torch::stable::contiguous(v_weight)),
        q_bias(contiguous_or_null(q_bias)),
        v_bias(contiguous_or_null(v_bias)),
        norm_weight(contiguous_or_null(norm_weight)),
        norm_bias(contiguous_or_null(norm_bias)) {}
};

void check(const Inputs& in, const Options& o) {
  const Dtype dtype = dtype_of(in.cls);
  STD_TORCH_CHECK(in.cls.dim() == 3 && in.cls.size(1) == 1 && in.cls.size(2) > 0,
                  "clsattn: cls_token must be [B, 1, C]");
  const int64_t channels = in.cls.size(2);
  STD_TORCH_CHECK(in.patches.dim() == 3 && in.patches.size(0) == in.cls.size(0) &&
                      in.patches.size(2) == channels && dtype_of(in.patches) == dtype,
                  "clsattn: patches must be [B, N, C] of cls_token's batch, channels and dtype");
  STD_TORCH_CHECK(o.heads > 0 && channels % o.heads == 0,
                  "clsattn: num_heads must divide the channels");
  for (const Tensor* t : {&in.q_weight, &in.k_weight, &in.v_weight}) {
    STD_TORCH_CHECK(
        t->dim() == 2 && t->size(0) == channels && t->size(1) == channels && dtype_of(*t) == dtype,
        "clsattn: weights must be [C, C] of cls_token's dtype");
  }
  for (const Optional* t : {&in.q_bias, &in.v_bias, &in.norm_weight, &in.norm_bias}) {
    STD_TORCH_CHECK(!t->has_value() || ((*t)->numel() == channels && dtype_of(**t) == dtype),
                    "clsattn: biases and the norm's weights must be [C] of cls_token's dtype");
  }
  STD_TORCH_CHECK(in.norm_weight.has_value() || !in.norm_bias.has_value(),
                  "clsattn: norm_bias needs norm_weight");
}

ClsAttnArgs make_args(const Inputs& in, const Optional& seed, const Options& o) {
  check(in, o);
  ClsAttnArgs a{};
  a.dtype = dtype_of(in.cls);
  a.batch = in.cls.size(0);
  a.tokens = 1 + in.patches.size(1);
  STD_TORCH_CHECK(a.tokens <= INT32_MAX, "clsattn: more than 2^31 tokens");
  a.heads = o.heads;
  a.head_dim = in.cls.size(2) / o.heads;
  a.eps = o.eps;
  a.scale = o.scale;
  a.dropout_p = o.dropout_p;
  if (o.dropout_p > 0) read_seed(seed, a.dropout_key);
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
  const ClsAttnKernels& kernels = select_clsattn_kernels();
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

std::vector<int64_t> head_sizes(const ClsAttnArgs& a) {
  return {a.batch, a.heads, a.head_dim + 2 * a.channels()};
}
std::vector<int64_t> token_sizes(const ClsAttnArgs& a) {
  return {a.batch, a.heads + (a.norm_weight ? 2 : 0), a.tokens};
}

std::tuple<Tensor, Tensor, Tensor> clsattn_fwd(Tensor cls, Tensor patches, Tensor q_weight,
                                               Optional q_bias, Tensor k_weight, Tensor v_weight,
                                               Optional v_bias, Optional norm_weight,
                                               Optional norm_bias, Optional seed, int64_t heads,
                                               double eps, double scale, double dropout_p) {
  const Inputs in(cls, patches, q_weight, q_bias, k_weight, v_weight, v_bias, norm_weight,
                  norm_bias);
  ClsAttnArgs a = make_args(in, seed, {heads, eps, scale, dropout_p});
  Tensor out = empty_for(in.cls, {a.batch, 1, a.channels()});
  Tensor head_state = empty_for(in.cls, head_sizes(a), compute_type(a.dtype));
  Tensor token_state = empty_for(in.cls, token_sizes(a), compute_type(a.dtype));
  a.out = out.mutable_data_ptr();
  a.head_state = head_state.mutable_data_ptr();
  a.token_state = token_state.mutable_data_ptr();
  run_stages(a, ClsAttnStage::kToken, ClsAttnStage::kForward);
  return {out, head_state, token_state};
}

bool has_sizes(const Tensor& t, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  return same;
}

void set_state(ClsAttnArgs& a, const Tensor& grad_out, const Tensor& head_state,
               const Tensor& token_state) {
  STD_TORCH_CHECK(has_sizes(grad_out, {a.batch, 1, a.channels()}) && dtype_of(grad_out) == a.dtype,
                  "clsattn: grad_out must have the shape and dtype of the output");
  const auto type = compute_type(a.dtype);
  STD_TORCH_CHECK(has_sizes(head_state, head_sizes(a)) && head_state.scalar_type() == type &&
                      has_sizes(token_state, token_sizes(a)) && token_state.scalar_type() == type,
                  "clsattn: head_state and token_state must be what clsattn_fwd returned");
  a.grad_out = grad_out.const_data_ptr();
  a.grad_out_stride = grad_out.stride(0);
  a.head_state = const_cast<void*>(head_state.const_data_ptr());
  a.token_state = const_cast<void*>(token_state.const_data_ptr());
}

using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors clsattn_bwd(Tensor grad_out, Tensor cls, Tensor patches, Tensor q_weight,
                        Optional q_bias, Tensor k_weight, Tensor v_weight, Optional v_bias,
                        Optional norm_weight, Optional norm_bias, Tensor head_state,
                        Tensor token_state, Optional seed, int64_t heads, double eps, double scale,
                        double dropout_p) {
  const Inputs in(cls, patches, q_weight, q_bias, k_weight, v_weight, v_bias, norm_weight,
                  norm_bias);
  ClsAttnArgs a = make_args(in, seed, {heads, eps, scale, dropout_p});
  grad_out = dense_last(grad_out);
  head_state = torch::stable::contiguous(head_state);
  token_state = torch::stable::contiguous(token_state);
  set_state(a, grad_out, head_state, token_state);

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
