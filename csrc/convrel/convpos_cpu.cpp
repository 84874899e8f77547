// Convolutional position encoding on the CPU: checks, allocation, threads. The arithmetic is in
// convpos_cpu_kernels.cpp.
#include "convpos.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "common/weight_gradients.h"
#include "convpos_checks.h"

namespace xattn {

XATTN_SELECT_KERNELS(ConvPosKernels, convpos_kernels)

namespace {

// A call's tensors and per-channel tables, held as long as the kernels read them.
struct ConvPosCall {
  Tensor x, weight;
  std::optional<Tensor> bias;
  DepthwiseTable table;
  ConvPosArgs args{};

  ConvPosCall(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
              const ConvPosOptions& o) {
    check_convpos(o, x_in, weight_in, bias_in);
    x = dense_last(x_in);
    weight = torch::stable::contiguous(weight_in);
    bias = contiguous_or_null(bias_in);
    args.dtype = dtype_of(x);
    args.batch = x.size(0);
    args.prefix = o.prefix;
    args.height = o.height;
    args.width = o.width;
    args.channels = x.size(2);
    table.add(args.channels, weight.size(2));
    args.conv = table.weights(weight, bias);
    args.x = x.const_data_ptr();
    for (int i = 0; i < 2; ++i) args.x_stride[i] = x.stride(i);
    // A few cache lines of every token, and rows cut apart where images and groups are few.
    constexpr int64_t kGroup = 64, kUnits = 64, kRowsPerBand = 8;
    args.group_channels = std::min(args.channels, kGroup);
    const int64_t units = std::max<int64_t>(1, args.batch * args.groups());
    args.bands =
        std::clamp<int64_t>(kUnits / units, 1, std::max<int64_t>(1, o.height / kRowsPerBand));
  }
};

Tensor convpos_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t grid_h,
                   int64_t grid_w, int64_t prefix) {
  ConvPosCall call(x, weight, bias, {grid_h, grid_w, prefix});
  ConvPosArgs& a = call.args;
  Tensor out = empty_for(call.x, {a.batch, a.tokens(), a.channels});
  a.out = out.mutable_data_ptr();
  const ConvPosKernels& kernels = select_convpos_kernels(a.dtype);
  const int64_t bytes = kernels.forward_scratch(a);
  const int64_t units = a.batch * a.groups() * a.bands;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.forward(a, begin, end, scratch.get());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> convpos_bwd(Tensor grad_out, Tensor x, Tensor weight,
                                               std::optional<Tensor> bias, int64_t grid_h,
                                               int64_t grid_w, int64_t prefix) {
  ConvPosCall call(x, weight, bias, {grid_h, grid_w, prefix});
  ConvPosArgs& a = call.args;
  check_convpos_gradient(x, grad_out);
  grad_out = dense_last(grad_out);
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  Tensor grad_x = empty_for(call.x, {a.batch, a.tokens(), a.channels});
  a.out = grad_x.mutable_data_ptr();

  const ConvPosKernels& kernels = select_convpos_kernels(a.dtype);
  const int64_t bytes = kernels.backward_scratch(a);
  WeightGradients gradients(call.x, a.batch, a.groups(),
                            {call.weight.numel(), call.bias.has_value() ? a.channels : 0});
  gradients.for_chunks<ConvPosChunk>(a.batch, a.groups(), bytes,
                                     [&](const ConvPosChunk* chunks, int64_t count, void* scratch) {
                                       kernels.backward(a, chunks, count, scratch);
                                     });
  return {grad_x,
          torch::stable::view(gradients.sum(0), {a.channels, 1, weight.size(2), weight.size(2)}),
          gradients.sum(1)};
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("convpos_fwd", TORCH_BOX(&xattn::convpos_fwd));
  m.impl("convpos_bwd", TORCH_BOX(&xattn::convpos_bwd));
}
