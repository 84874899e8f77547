// Factorised conv-relative attention on the CPU: checks, allocation, threads. The arithmetic is in
// convrel_cpu_kernels.cpp.
#include "convrel.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "common/weight_gradients.h"
#include "convrel_checks.h"

namespace xattn {

XATTN_SELECT_KERNELS(ConvRelKernels, convrel_kernels)

namespace {

using Ints = std::vector<int64_t>;

// A call's tensors and per-channel tables, held as long as the kernels read them.
struct ConvRelCall {
  Tensor qkv, weight;
  std::optional<Tensor> bias;
  DepthwiseTable table;
  ConvRelArgs args{};

  ConvRelCall(const Tensor& qkv_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
              const ConvRelOptions& o) {
    check_convrel(o, qkv_in, weight_in, bias_in);
    qkv = dense_last(qkv_in);
    weight = torch::stable::contiguous(weight_in);
    bias = contiguous_or_null(bias_in);
    for (size_t g = 0; g < o.windows.size(); ++g) table.add(o.channels[g], o.windows[g]);
    set_sizes(o);
    args.conv = table.weights(weight, bias);
    args.group_heads = choose_group();
  }

 private:
  void set_sizes(const ConvRelOptions& o) {
    args.dtype = dtype_of(qkv);
    args.batch = qkv.size(0);
    args.prefix = o.prefix;
    args.height = o.height;
    args.width = o.width;
    args.heads = o.heads;
    args.head_dim = qkv.size(2) / (3 * o.heads);
    args.scale = o.scale;
    args.qkv = qkv.const_data_ptr();
    for (int i = 0; i < 2; ++i) args.qkv_stride[i] = qkv.stride(i);
  }

  // The fewest heads that fill whole cache lines, or all; fewer where units would be few.
  int64_t choose_group() const {
    constexpr int64_t kLine = 64, kUnits = 16;
    const int64_t value = args.dtype == Dtype::kFloat64 ? 8 : args.dtype == Dtype::kFloat32 ? 4 : 2;
    int64_t best = 1;
    for (int64_t heads = 2; heads <= args.heads; ++heads) {
      if (best * args.head_dim * value % kLine == 0) break;
      if (args.heads % heads == 0 && args.batch * (args.heads / heads) >= kUnits) best = heads;
    }
    return best;
  }
};

std::tuple<Tensor, Tensor> convrel_fwd(Tensor qkv, Tensor conv_weight,
                                       std::optional<Tensor> conv_bias, Ints windows, Ints channels,
                                       int64_t heads, int64_t grid_h, int64_t grid_w,
                                       int64_t prefix, double scale) {
  ConvRelCall call(qkv, conv_weight, conv_bias,
                   {windows, channels, heads, grid_h, grid_w, prefix, scale});
  ConvRelArgs& a = call.args;
  Tensor out = empty_for(call.qkv, {a.batch, a.tokens(), a.channels()});
  Tensor state = empty_for(call.qkv, Ints{a.batch, a.heads, a.head_dim, a.head_dim + 2},
                           compute_type(a.dtype));
  a.out = out.mutable_data_ptr();
  a.state = state.mutable_data_ptr();

  const ConvRelKernels& kernels = select_convrel_kernels(a.dtype);
  const int64_t bytes = kernels.forward_scratch(a);
  torch::stable::parallel_for(0, a.groups() * a.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.forward(a, begin, end, scratch.get());
  });
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor> convrel_bwd(Tensor grad_out, Tensor qkv, Tensor conv_weight,
                                               std::optional<Tensor> conv_bias, Tensor state,
                                               Ints windows, Ints channels, int64_t heads,
                                               int64_t grid_h, int64_t grid_w, int64_t prefix,
                                               double scale) {
  const ConvRelOptions options{windows, channels, heads, grid_h, grid_w, prefix, scale};
  ConvRelCall call(qkv, conv_weight, conv_bias, options);
  check_convrel_gradient(options, qkv, grad_out, state);
  ConvRelArgs& a = call.args;
  grad_out = dense_last(grad_out);
  state = torch::stable::contiguous(state);
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  a.state = state.mutable_data_ptr();
  Tensor grad_qkv = empty_for(call.qkv, {a.batch, a.tokens(), 3 * a.channels()});
  a.grad_qkv = grad_qkv.mutable_data_ptr();

  const ConvRelKernels& kernels = select_convrel_kernels(a.dtype);
  const int64_t bytes = kernels.backward_scratch(a);
  WeightGradients gradients(call.qkv, a.batch, a.groups(),
                            {call.weight.numel(), call.bias.has_value() ? a.channels() : 0});
  gradients.for_chunks<ConvRelChunk>(a.batch, a.groups(), bytes,
                                     [&](const ConvRelChunk* chunks, int64_t count, void* scratch) {
                                       kernels.backward(a, chunks, count, scratch);
                                     });
  return {grad_qkv, gradients.sum(0), gradients.sum(1)};
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("convrel_fwd", TORCH_BOX(&xattn::convrel_fwd));
  m.impl("convrel_bwd", TORCH_BOX(&xattn::convrel_bwd));
}
