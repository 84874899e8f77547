// Conv-relative attention on CUDA: checks, allocation, launches. The kernels are in
// convrel_context.cuh, convrel_forward.cuh, convrel_backward.cuh and
// common/depthwise_gradients.cuh.
#include "common/cuda_call.h"
#include "common/depthwise_launch.h"
#include "convrel_backward.cuh"
#include "convrel_checks.h"
#include "convrel_context.cuh"

namespace xattn::convrel_cuda {

namespace {

using Ints = std::vector<int64_t>;
using torch::headeronly::ScalarType;

// One call: its sizes, its convolutions, and the parts of a launch that several kernels share.
class ConvRelCuda {
 public:
  ConvRelCuda(const Tensor& qkv_in, const Tensor& weight, const std::optional<Tensor>& bias,
              const ConvRelOptions& o)
      : call(qkv_in), options(o) {
    check_convrel(o, qkv_in, weight, bias);
    set_sizes(qkv_in);
    convolution.emplace(call, torch::stable::contiguous(weight), contiguous_or_null(bias),
                        o.windows, o.channels);
    base = static_cast<const char*>(call.read(qkv));
    vector = in_vectors(qkv) && channels * bytes % 16 == 0;
  }

  CudaCall call;
  Tensor qkv;
  ConvRelOptions options;
  std::optional<DepthwiseCuda> convolution;
  Dtype dtype{};
  int64_t bytes = 0;  // of a value
  int64_t batch = 0, tokens = 0, channels = 0, head_dim = 0;
  bool vector = false;  // every activation can be read in vectors

  const void* q() const { return base; }
  const void* k() const { return base + channels * bytes; }
  const void* v() const { return base + 2 * channels * bytes; }
  bool convolves() const { return convolution->largest() > 0; }
  Bands bands() const { return cut_into_bands(channels, head_dim, bytes, vector); }

  // How a kernel that needs `fixed` bytes of shared memory besides a ring shares the tokens out.
  StripPlan plan(const Bands& bands, int64_t fixed) const {
    const int64_t units = std::max<int64_t>(1, batch * bands.count * bands.tiles);
    if (!convolves()) return plan_plain(tokens, units);
    return plan_strips(options.prefix, options.height, options.width, convolution->largest(), units,
                       (call.shared_limit() - fixed) / bytes);
  }

  // Sums over the tokens of left^T right, in shares of [parts, batch, channels, row_values].
  ContextArgs context(const void* left, const Tensor& right_of, const void* right,
                      int64_t row_values) const {
    ContextArgs a{};
    a.left = left;
    a.right = right;
    for (int i = 0; i < 2; ++i) {
      a.left_stride[i] = qkv.stride(i);
      a.right_stride[i] = right_of.stride(i);
    }
    a.batch = batch;
    a.tokens = tokens;
    a.bands = bands();
    constexpr int64_t kBlocks = 1024, kLeastTiles = 4;
    const int64_t tiles = (tokens + kRunTokens - 1) / kRunTokens;
    const int64_t units =
        std::max<int64_t>(1, batch * a.bands.count * a.bands.tiles * a.bands.tiles);
    const int64_t most = std::max<int64_t>(1, tiles / kLeastTiles);
    const int64_t parts = std::clamp<int64_t>(kBlocks / units, 1, most);
    a.part_tiles = static_cast<int>((tiles + parts - 1) / parts);
    a.parts = static_cast<int>((tiles + a.part_tiles - 1) / a.part_tiles);
    a.whole = a.parts == 1;
    a.row_values = static_cast<int>(row_values);
    a.scale = static_cast<float>(options.scale);
    a.vector = vector;
    return a;
  }
  dim3 context_grid(const ContextArgs& a) const {
    return dim3(
        static_cast<unsigned>(batch * a.parts * a.bands.count * a.bands.tiles * a.bands.tiles));
  }
  dim3 strip_grid(const Bands& bands, const StripPlan& plan) const {
    return dim3(static_cast<unsigned>(batch * bands.count * bands.tiles * plan.blocks()));
  }
  dim3 combine_grid() const {
    return dim3(static_cast<unsigned>((batch * channels + kCombineRows - 1) / kCombineRows));
  }

 private:
  const char* base = nullptr;

  void set_sizes(const Tensor& qkv_in) {
    qkv = dense_last(qkv_in);
    dtype = dtype_of(qkv);
    bytes = static_cast<int64_t>(qkv.element_size());
    batch = qkv.size(0);
    tokens = qkv.size(1);
    channels = qkv.size(2) / 3;
    head_dim = channels / options.heads;
  }
};

// scale x M + x * (conv(v) + bias), see convrel_forward.cuh. x: [batch, tokens, ...], in `x_of`.
void launch_mix(ConvRelCuda& c, const Tensor& x_of, const void* x, const void* matrices,
                bool transposed, void* out, int64_t out_stride) {
  MixArgs a{};
  a.x = x;
  a.values = c.v();
  for (int i = 0; i < 2; ++i) {
    a.x_stride[i] = x_of.stride(i);
    a.value_stride[i] = c.qkv.stride(i);
  }
  a.matrices = static_cast<const float*>(matrices);
  a.out = out;
  a.out_stride = out_stride;
  a.tokens = c.tokens;
  a.bands = c.bands();
  a.taps = c.convolution->table();
  a.row_values = static_cast<int>(c.head_dim + 2);
  a.scale = static_cast<float>(c.options.scale);
  a.transposed = transposed;
  a.vector = c.vector;
  for_storage(c.dtype, [&](auto type) {
    using Memory = MixMemory<decltype(type)>;
    a.plan = c.plan(a.bands, static_cast<int64_t>(Memory::bytes(a.bands, 0)));
    c.call.launch(&mix<decltype(type)>, c.strip_grid(a.bands, a.plan), kStripThreads,
                  Memory::bytes(a.bands, a.plan.ring_values()), a);
  });
}

std::tuple<Tensor, Tensor> convrel_fwd(Tensor qkv, Tensor conv_weight,
                                       std::optional<Tensor> conv_bias, Ints windows, Ints channels,
                                       int64_t heads, int64_t grid_h, int64_t grid_w,
                                       int64_t prefix, double scale) {
  ConvRelCuda c(qkv, conv_weight, conv_bias,
                {windows, channels, heads, grid_h, grid_w, prefix, scale});
  Tensor out = c.call.empty({c.batch, c.tokens, c.channels}, c.qkv.scalar_type());
  Tensor state = c.call.empty({c.batch, heads, c.head_dim, c.head_dim + 2}, ScalarType::Float);
  c.vector = c.vector && in_vectors(out);
  auto* const state_data = static_cast<float*>(c.call.write(state));
  ContextArgs a = c.context(c.k(), c.qkv, c.v(), c.head_dim + 2);
  std::optional<Tensor> shares;
  a.shares = state_data;
  if (!a.whole) {
    shares = c.call.empty({a.parts, c.batch, c.channels, c.head_dim + 2}, ScalarType::Float);
    a.shares = static_cast<float*>(c.call.write(*shares));
  }
  for_storage(c.dtype, [&](auto type) {
    using T = decltype(type);
    c.call.launch(&sum_context<T, true>, c.context_grid(a), kStripThreads, kContextShared<T>, a);
  });
  if (!a.whole) {
    c.call.launch(&combine_context, c.combine_grid(), kCombineThreads, 0, a.shares, state_data,
                  c.batch * c.channels, static_cast<int>(c.head_dim), a.parts);
  }
  launch_mix(c, c.qkv, c.q(), state_data, false, c.call.write(out), c.channels);
  return {out, state};
}

// dM and its row sums, [batch, channels, head_dim + 1]. E = q * grad_out goes to `product`, where
// there are convolutions.
Tensor change_of_context(ConvRelCuda& c, const Tensor& grad_out, const void* grad,
                         const void* state, void* product) {
  ContextArgs a = c.context(c.q(), grad_out, grad, c.head_dim);
  if (c.convolves()) a.product = product;
  a.product_stride = 3 * c.channels;
  Tensor shares = c.call.empty({a.parts, c.batch, c.channels, c.head_dim}, ScalarType::Float);
  Tensor change = c.call.empty({c.batch, c.channels, c.head_dim + 1}, ScalarType::Float);
  a.shares = static_cast<float*>(c.call.write(shares));
  auto* const to = static_cast<float*>(c.call.write(change));
  for_storage(c.dtype, [&](auto type) {
    using T = decltype(type);
    c.call.launch(&sum_context<T, false>, c.context_grid(a), kStripThreads, kContextShared<T>, a);
    c.call.launch(&combine_gradient<T>, c.combine_grid(), kCombineThreads, 0, a.shares,
                  static_cast<const float*>(state), to, c.batch * c.channels,
                  static_cast<int>(c.head_dim), a.parts);
  });
  return change;
}

// The gradients of k and v into grad_qkv, in whose place for q stands E.
void launch_key_values(ConvRelCuda& c, const void* state, const void* change, char* grad_qkv) {
  KeyValueArgs a{};
  a.keys = c.k();
  a.values = c.v();
  for (int i = 0; i < 2; ++i) a.qkv_stride[i] = c.qkv.stride(i);
  a.product = grad_qkv;
  a.state = static_cast<const float*>(state);
  a.change = static_cast<const float*>(change);
  a.grad_keys = grad_qkv + c.channels * c.bytes;
  a.grad_values = grad_qkv + 2 * c.channels * c.bytes;
  a.grad_stride = 3 * c.channels;
  a.tokens = c.tokens;
  a.bands = c.bands();
  a.taps = c.convolution->table();
  a.vector = c.vector;
  for_storage(c.dtype, [&](auto type) {
    using Memory = KeyValueMemory<decltype(type)>;
    a.plan = c.plan(a.bands, static_cast<int64_t>(Memory::bytes(a.bands, 0)));
    c.call.launch(&key_value_gradients<decltype(type)>, c.strip_grid(a.bands, a.plan),
                  kStripThreads, Memory::bytes(a.bands, a.plan.ring_values()), a);
  });
}

std::tuple<Tensor, Tensor> tap_gradients(ConvRelCuda& c, const void* product) {
  const ConvRelOptions& o = c.options;
  const DepthwiseActivations activations{product,
                                         c.v(),
                                         {c.tokens * 3 * c.channels, 3 * c.channels},
                                         {c.qkv.stride(0), c.qkv.stride(1)},
                                         c.batch,
                                         o.prefix,
                                         o.height,
                                         o.width,
                                         c.channels,
                                         c.vector};
  return c.convolution->gradients(c.call, activations);
}

std::tuple<Tensor, Tensor, Tensor> convrel_bwd(Tensor grad_out, Tensor qkv, Tensor conv_weight,
                                               std::optional<Tensor> conv_bias, Tensor state,
                                               Ints windows, Ints channels, int64_t heads,
                                               int64_t grid_h, int64_t grid_w, int64_t prefix,
                                               double scale) {
  ConvRelCuda c(qkv, conv_weight, conv_bias,
                {windows, channels, heads, grid_h, grid_w, prefix, scale});
  check_convrel_gradient(c.options, qkv, grad_out, state);
  grad_out = dense_last(grad_out);
  state = torch::stable::contiguous(state);
  const void *grad = c.call.read(grad_out), *saved = c.call.read(state);
  Tensor grad_qkv = c.call.empty({c.batch, c.tokens, 3 * c.channels}, c.qkv.scalar_type());
  auto* const to = static_cast<char*>(c.call.write(grad_qkv));
  c.vector = c.vector && in_vectors(grad_out) && in_vectors(grad_qkv);

  Tensor change = change_of_context(c, grad_out, grad, saved, to);
  launch_key_values(c, saved, c.call.read(change), to);
  Tensor grad_weight = c.call.empty({0}, c.qkv.scalar_type());
  Tensor grad_bias = c.call.empty({0}, c.qkv.scalar_type());
  if (c.convolves()) std::tie(grad_weight, grad_bias) = tap_gradients(c, to);
  launch_mix(c, grad_out, grad, saved, true, to, 3 * c.channels);  // last: it takes the place of E
  return {grad_qkv, grad_weight, grad_bias};
}

}  // namespace
}  // namespace xattn::convrel_cuda

XATTN_CUDA_OPS(m) {
  m.impl("convrel_fwd", TORCH_BOX(&xattn::convrel_cuda::convrel_fwd));
  m.impl("convrel_bwd", TORCH_BOX(&xattn::convrel_cuda::convrel_bwd));
}
