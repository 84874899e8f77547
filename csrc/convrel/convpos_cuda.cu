// Convolutional position encoding on CUDA: checks, allocation, launches. The kernels are in
// convpos_kernels.cuh, those of the gradients in common/depthwise_gradients.cuh.
#include "common/cuda_call.h"
#include "common/depthwise_launch.h"
#include "convpos_kernels.cuh"

namespace xattn::convpos_cuda {

namespace {

struct Sizes {
  int64_t batch, tokens, channels, height, width, prefix, window;
};

Sizes sizes_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               int64_t height, int64_t width, int64_t prefix) {
  STD_TORCH_CHECK(x.dim() == 3 && height > 0 && width > 0 && prefix >= 0 && x.size(2) > 0 &&
                      x.size(1) == prefix + height * width,
                  "convpos: x must be [B, num_prefix_tokens + grid_h * grid_w, C]");
  const Sizes s{x.size(0),
                x.size(1),
                x.size(2),
                height,
                width,
                prefix,
                weight.dim() == 4 ? weight.size(3) : 0};
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == s.channels && weight.size(1) == 1 &&
                      weight.size(2) == s.window && s.window % 2 == 1 &&
                      dtype_of(weight) == dtype_of(x),
                  "convpos: weight must be [C, 1, k, k] with odd k, in x's dtype");
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->numel() == s.channels && dtype_of(*bias) == dtype_of(x)),
      "convpos: bias must be [C], in x's dtype");
  return s;
}

// x plus its convolution, or its transposed convolution without the bias.
template <bool kTransposed>
Tensor add(CudaCall& call, const Tensor& x, const DepthwiseCuda& convolution, const Sizes& s) {
  const auto bytes = static_cast<int64_t>(x.element_size());
  Tensor out = call.empty({s.batch, s.tokens, s.channels}, x.scalar_type());
  EncodingArgs a{};
  a.x = call.read(x);
  for (int i = 0; i < 2; ++i) a.stride[i] = x.stride(i);
  a.out = call.write(out);
  a.tokens = s.tokens;
  a.vector = in_vectors(x) && in_vectors(out);
  a.bands = cut_channels(s.channels, bytes, a.vector);
  const int64_t units = std::max<int64_t>(1, s.batch * a.bands.count);
  a.plan = plan_strips(s.prefix, s.height, s.width, convolution.largest(), units,
                       call.shared_limit() / bytes);
  a.taps = convolution.table();
  const auto grid = static_cast<unsigned>(s.batch * a.bands.count * a.plan.blocks());
  for_storage(dtype_of(x), [&](auto type) {
    using T = decltype(type);
    call.launch(&add_convolution<T, kTransposed>, dim3(grid), kStripThreads,
                a.plan.ring_values() * sizeof(T), a);
  });
  return out;
}

Tensor convpos_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t grid_h,
                   int64_t grid_w, int64_t prefix) {
  const Sizes s = sizes_of(x, weight, bias, grid_h, grid_w, prefix);
  CudaCall call(x);
  const DepthwiseCuda convolution(call, torch::stable::contiguous(weight), contiguous_or_null(bias),
                                  {s.window}, {s.channels});
  return add<false>(call, dense_last(x), convolution, s);
}

std::tuple<Tensor, Tensor, Tensor> convpos_bwd(Tensor grad_out, Tensor x, Tensor weight,
                                               std::optional<Tensor> bias, int64_t grid_h,
                                               int64_t grid_w, int64_t prefix) {
  const Sizes s = sizes_of(x, weight, bias, grid_h, grid_w, prefix);
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == s.batch &&
                      grad_out.size(1) == s.tokens && grad_out.size(2) == s.channels &&
                      dtype_of(grad_out) == dtype_of(x),
                  "convpos: grad_out must have the shape and dtype of the output");
  CudaCall call(x);
  const DepthwiseCuda convolution(call, torch::stable::contiguous(weight), contiguous_or_null(bias),
                                  {s.window}, {s.channels});
  x = dense_last(x);
  grad_out = dense_last(grad_out);
  Tensor grad_x = add<true>(call, grad_out, convolution, s);
  const DepthwiseActivations activations{call.read(grad_out),
                                         call.read(x),
                                         {grad_out.stride(0), grad_out.stride(1)},
                                         {x.stride(0), x.stride(1)},
                                         s.batch,
                                         s.prefix,
                                         s.height,
                                         s.width,
                                         s.channels,
                                         in_vectors(grad_out) && in_vectors(x)};
  auto [grad_weight, grad_bias] = convolution.gradients(call, activations);
  return {grad_x, torch::stable::view(grad_weight, {s.channels, 1, s.window, s.window}), grad_bias};
}

}  // namespace
}  // namespace xattn::convpos_cuda

XATTN_CUDA_OPS(m) {
  m.impl("convpos_fwd", TORCH_BOX(&xattn::convpos_cuda::convpos_fwd));
  m.impl("convpos_bwd", TORCH_BOX(&xattn::convpos_cuda::convpos_bwd));
}
