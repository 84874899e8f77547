// Factorised conv-relative attention on the CPU: checks, allocation, threads. The arithmetic is in
// convrel_cpu_kernels.cpp.
#include "convrel.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "common/weight_gradients.h"

namespace xattn {

XATTN_SELECT_KERNELS(ConvRelKernels, convrel_kernels)

namespace {

using Ints = std::vector<int64_t>;

struct Options {
  Ints windows, channels;
  int64_t heads, height, width, prefix;
  double scale;
};

// A call's tensors and per-channel tables, held as long as the kernels read them.
struct ConvRelCall {
  Tensor qkv, weight;
  std::optional<Tensor> bias;
  DepthwiseTable table;
  ConvRelArgs args{};

  ConvRelCall(const Tensor& qkv_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
              const Options& o)
      : qkv(dense_last(qkv_in)),
        weight(torch::stable::contiguous(weight_in)),
        bias(contiguous_or_null(bias_in)) {
    set_sizes(o);
    set_weights(o);
    args.group_heads = choose_group();
  }

 private:
  void set_sizes(const Options& o) {
    STD_TORCH_CHECK(qkv.dim() == 3 && o.height > 0 && o.width > 0 && o.prefix >= 0 &&
                        qkv.size(1) == o.prefix + o.height * o.width,
                    "convrel: qkv must be [B, num_prefix_tokens + grid_h * grid_w, 3C]");
    STD_TORCH_CHECK(o.heads > 0 && qkv.size(2) > 0 && qkv.size(2) % (3 * o.heads) == 0,
                    "convrel: num_heads must divide the channels");
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

  void set_weights(const Options& o) {
    STD_TORCH_CHECK(o.windows.size() == o.channels.size(),
                    "convrel: one window for each channel group");
    for (size_t g = 0; g < o.windows.size(); ++g) {
      STD_TORCH_CHECK(o.windows[g] > 0 && o.windows[g] % 2 == 1, "convrel: windows must be odd");
      table.add(o.channels[g], o.windows[g]);
    }
    STD_TORCH_CHECK(table.channels() == 0 || table.channels() == args.channels(),
                    "convrel: the channel groups must cover all channels");
    STD_TORCH_CHECK(weight.numel() == table.size && dtype_of(weight) == args.dtype,
                    "convrel: conv_weight must hold every group's windows, in qkv's dtype");
    STD_TORCH_CHECK(
        !bias.has_value() || (bias->numel() == table.channels() && dtype_of(*bias) == args.dtype),
        "convrel: conv_bias must be [C], in qkv's dtype");
    args.conv = table.weights(weight, bias);
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

  const ConvRelKernels& kernels = select_convrel_kernels();
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
  ConvRelCall call(qkv, conv_weight, conv_bias,
                   {windows, channels, heads, grid_h, grid_w, prefix, scale});
  ConvRelArgs& a = call.args;
  grad_out = dense_last(grad_out);
  state = torch::stable::contiguous(state);
  const auto compute = compute_type(a.dtype);
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == a.batch &&
                      grad_out.size(1) == a.tokens() && grad_out.size(2) == a.channels() &&
                      dtype_of(grad_out) == a.dtype,
                  "convrel: grad_out must have the shape and dtype of the output");
  STD_TORCH_CHECK(
      state.numel() == a.batch * a.channels() * (a.head_dim + 2) && state.scalar_type() == compute,
      "convrel: state must come from convrel_fwd");
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  a.state = state.mutable_data_ptr();
  Tensor grad_qkv = empty_for(call.qkv, {a.batch, a.tokens(), 3 * a.channels()});
  a.grad_qkv = grad_qkv.mutable_data_ptr();

  const ConvRelKernels& kernels = select_convrel_kernels();
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
