// Convolutional position encoding on CUDA: checks, allocation, launches. The kernels are in
// convpos_kernels.cuh, those of the gradients in common/depthwise_gradients.cuh.
#include "common/cuda_call.h"
#include "common/depthwise_launch.h"
#include "convpos_checks.h"
#include "convpos_kernels.cuh"

namespace xattn::convpos_cuda {

namespace {

DepthwiseCuda convolution_of(CudaCall& call, const Tensor& weight,
                             const std::optional<Tensor>& bias) {
  return {call,
          torch::stable::contiguous(weight),
          contiguous_or_null(bias),
          {weight.size(3)},
          {weight.size(0)}};
}

// x plus its convolution, or its transposed convolution without the bias.
template <bool kTransposed>
Tensor add(CudaCall& call, const Tensor& x, const DepthwiseCuda& convolution,
           const ConvPosOptions& o) {
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const auto bytes = static_cast<int64_t>(x.element_size());
  Tensor out = call.empty({batch, tokens, channels}, x.scalar_type());
  EncodingArgs a{};
  a.x = call.read(x);
  for (int i = 0; i < 2; ++i) a.stride[i] = x.stride(i);
  a.out = call.write(out);
  a.tokens = tokens;
  a.vector = in_vectors(x) && in_vectors(out);
  a.bands = cut_channels(channels, bytes, a.vector);
  const int64_t units = std::max<int64_t>(1, batch * a.bands.count);
  a.plan = plan_strips(o.prefix, o.height, o.width, convolution.largest(), units,
                       call.shared_limit() / bytes);
  a.taps = convolution.table();
  const auto grid = static_cast<unsigned>(batch * a.bands.count * a.plan.blocks());
  for_storage(dtype_of(x), [&](auto type) {
    using T = decltype(type);
    call.launch(&add_convolution<T, kTransposed>, dim3(grid), kStripThreads,
                a.plan.ring_values() * sizeof(T), a);
  });
  return out;
}

Tensor convpos_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t grid_h,
                   int64_t grid_w, int64_t prefix) {
  const ConvPosOptions o{grid_h, grid_w, prefix};
  check_convpos(o, x, weight, bias);
  CudaCall call(x);
  return add<false>(call, dense_last(x), convolution_of(call, weight, bias), o);
}

std::tuple<Tensor, Tensor, Tensor> convpos_bwd(Tensor grad_out, Tensor x, Tensor weight,
                                               std::optional<Tensor> bias, int64_t grid_h,
                                               int64_t grid_w, int64_t prefix) {
  const ConvPosOptions o{grid_h, grid_w, prefix};
  check_convpos(o, x, weight, bias);
  check_convpos_gradient(x, grad_out);
  CudaCall call(x);
  const DepthwiseCuda convolution = convolution_of(call, weight, bias);
  x = dense_last(x);
  grad_out = dense_last(grad_out);
  Tensor grad_x = add<true>(call, grad_out, convolution, o);
  const DepthwiseActivations activations{call.read(grad_out),
                                         call.read(x),
                                         {grad_out.stride(0), grad_out.stride(1)},
                                         {x.stride(0), x.stride(1)},
                                         x.size(0),
                                         o.prefix,
                                         o.height,
                                         o.width,
                                         x.size(2),
                                         in_vectors(grad_out) && in_vectors(x)};
  auto [grad_weight, grad_bias] = convolution.gradients(call, activations);
  const int64_t window = weight.size(3);
  return {grad_x, torch::stable::view(grad_weight, {x.size(2), 1, window, window}), grad_bias};
}

}  // namespace
}  // namespace xattn::convpos_cuda

XATTN_CUDA_OPS(m) {
  m.impl("convpos_fwd", TORCH_BOX(&xattn::convpos_cuda::convpos_fwd));
  m.impl("convpos_bwd", TORCH_BOX(&xattn::convpos_cuda::convpos_bwd));
}
