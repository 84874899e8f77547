// Convolutional position encoding on the CPU: checks, allocation, threads. The arithmetic is in
// convpos_cpu_kernels.cpp.
#include "convpos.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "common/weight_gradients.h"

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
              int64_t height, int64_t width, int64_t prefix)
      : x(dense_last(x_in)),
        weight(torch::stable::contiguous(weight_in)),
        bias(contiguous_or_null(bias_in)) {
    STD_TORCH_CHECK(x.dim() == 3 && height > 0 && width > 0 && prefix >= 0 && x.size(2) > 0 &&
                        x.size(1) == prefix + height * width,
                    "convpos: x must be [B, num_prefix_tokens + grid_h * grid_w, C]");
    args.dtype = dtype_of(x);
    args.batch = x.size(0);
    args.prefix = prefix;
    args.height = height;
    args.width = width;
    args.channels = x.size(2);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == args.channels && weight.size(1) == 1 &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 &&
                        dtype_of(weight) == args.dtype,
                    "convpos: weight must be [C, 1, k, k] with odd k, in x's dtype");
    STD_TORCH_CHECK(
        !bias.has_value() || (bias->numel() == args.channels && dtype_of(*bias) == args.dtype),
        "convpos: bias must be [C], in x's dtype");
    table.add(args.channels, weight.size(2));
    args.conv = table.weights(weight, bias);
    args.x = x.const_data_ptr();
    for (int i = 0; i < 2; ++i) args.x_stride[i] = x.stride(i);
    // A few cache lines of every token, and rows cut apart where images and groups are few.
    constexpr int64_t kGroup = 64, kUnits = 64, kRowsPerBand = 8;
    args.group_channels = std::min(args.channels, kGroup);
    const int64_t units = std::max<int64_t>(1, args.batch * args.groups());
    args.bands =
        std::clamp<int64_t>(kUnits / units, 1, std::max<int64_t>(1, height / kRowsPerBand));
  }
};

Tensor convpos_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t grid_h,
                   int64_t grid_w, int64_t prefix) {
  ConvPosCall call(x, weight, bias, grid_h, grid_w, prefix);
  ConvPosArgs& a = call.args;
  Tensor out = empty_for(call.x, {a.batch, a.tokens(), a.channels});
  a.out = out.mutable_data_ptr();
  const ConvPosKernels& kernels = select_convpos_kernels();
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
  ConvPosCall call(x, weight, bias, grid_h, grid_w, prefix);
  ConvPosArgs& a = call.args;
  grad_out = dense_last(grad_out);
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == a.batch &&
                      grad_out.size(1) == a.tokens() && grad_out.size(2) == a.channels &&
                      dtype_of(grad_out) == a.dtype,
                  "convpos: grad_out must have the shape and dtype of the output");
  a.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 2; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  Tensor grad_x = empty_for(call.x, {a.batch, a.tokens(), a.channels});
  a.out = grad_x.mutable_data_ptr();

  const ConvPosKernels& kernels = select_convpos_kernels();
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
