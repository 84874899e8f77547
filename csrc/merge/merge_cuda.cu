// Token merge and enhancement on CUDA: checks, allocation, launches.
#include <algorithm>
#include <tuple>

#include "common/cuda_call.h"
#include "common/cuda_rows.h"
#include "merge_backward.cuh"
#include "merge_checks.h"

namespace xattn {
namespace {

using merge_cuda::Args;
using merge_cuda::Convolution;
using merge_cuda::Map;
using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

// One call: its tensors in a layout that the kernels read, and their arguments.
struct MergeCall {
  CudaCall cuda;
  Tensor x, enhance;
  MaybeTensor merge, bias;
  Dtype dtype;
  bool vector;  // a token's channels are a multiple of 16 bytes
  Args args{};

  MergeCall(const Tensor& x_in, const MaybeTensor& merge_in, const Tensor& enhance_in,
            const MaybeTensor& bias_in, const MergeOptions& o)
      : cuda(x_in), dtype(dtype_of(x_in)) {
    check_merge(o, x_in, merge_in, enhance_in, bias_in);
    STD_TORCH_CHECK(x_in.size(1) <= INT32_MAX && x_in.size(2) <= INT32_MAX,
                    "merge: more than 2^31 tokens or channels");
    enhance = torch::stable::contiguous(enhance_in);
    merge = contiguous_or_null(merge_in);
    bias = contiguous_or_null(bias_in);
    vector = x_in.size(2) * static_cast<int64_t>(x_in.element_size()) % 16 == 0;
    x = rows(x_in);
    args.batch = x.size(0);
    args.channels = static_cast<int>(x.size(2));
    args.stride = static_cast<int>(o.largest_stride());
    args.x = {cuda.read(x),
              {x.stride(0), x.stride(1)},
              static_cast<int>(o.height),
              static_cast<int>(o.width),
              static_cast<int>(o.prefix)};
    args.enhance = convolution(enhance);
    args.enhanced = {nullptr, {0, 0}, args.x.height, args.x.width, args.x.prefix};
    args.digests = {nullptr, {0, 0}, 0, 0, 0};
    if (merge.has_value()) {
      args.merge = convolution(*merge);
      args.digests.height = (args.x.height + args.stride - 1) / args.stride;
      args.digests.width = (args.x.width + args.stride - 1) / args.stride;
    }
    args.bias = cuda.read(bias);
  }

  // A tensor of tokens as the kernels read it.
  Tensor rows(const Tensor& t) const { return vector ? aligned_rows(t) : dense_last(t); }

  bool empty() const { return args.batch == 0; }
  std::vector<int64_t> digest_sizes() const {
    return {args.batch, int64_t{args.digests.height} * args.digests.width, args.channels};
  }
  std::vector<int64_t> token_sizes() const { return {args.batch, x.size(1), args.channels}; }

  // The gradient of an output of these sizes; it is read where `map` then says.
  void read_gradient(MaybeTensor& grad, const std::vector<int64_t>& sizes, Map& map) {
    check_merge_gradient(x, grad, sizes);
    if (!grad.has_value()) return;
    grad = rows(*grad);
    map.data = cuda.read(*grad);
    for (int i = 0; i < 2; ++i) map.stride[i] = grad->stride(i);
  }

  // Cuts images into tiles whose pixels, with `reach` more on every side, leave room in shared
  // memory for those of other blocks.
  void set_tiles(int reach) {
    constexpr int kHeight = 16, kWidth = 32, kPixels = 512;
    args.tile_h = std::min(args.x.height, kHeight);
    args.tile_w = std::min(args.x.width, kWidth);
    const auto span = [&](int tile, int whole) {
      return std::min(int64_t{tile} + 2 * int64_t{reach}, int64_t{whole});
    };
    const auto pixels = [&] {
      return span(args.tile_h, args.x.height) * span(args.tile_w, args.x.width);
    };
    while (pixels() > kPixels && args.tile_h * args.tile_w > 1) {
      int& longer = args.tile_h >= args.tile_w ? args.tile_h : args.tile_w;
      longer = (longer + 1) / 2;
    }
    pixels_ = pixels();
    args.tiles_x = (args.x.width + args.tile_w - 1) / args.tile_w;
    args.tiles = (args.x.height + args.tile_h - 1) / args.tile_h * args.tiles_x;
  }

  // kernel(a value of the storage type, whether fast, grid, shared bytes), which launches `blocks`
  // blocks for each group of channels: the fast instance, where what it wants of shared memory is
  // there, or the general one. pixels, digests: places that the fast one has room for; windows:
  // whose taps it keeps; least: bytes that either needs.
  template <class Kernel>
  void launch(int64_t pixels, int64_t digests, std::vector<int> windows, int64_t least,
              int64_t blocks, Kernel kernel) {
    for_storage(dtype, [&](auto value) {
      using T = decltype(value);
      constexpr int64_t kPlace = merge_cuda::kGroup<T> * sizeof(T);
      args.groups = (args.channels + merge_cuda::kGroup<T> - 1) / merge_cuda::kGroup<T>;
      int64_t floats = 0;
      for (const int window : windows) floats += merge_cuda::tap_floats<T>(window);
      const int64_t room = std::max(pixels, (least + kPlace - 1) / kPlace);
      const int64_t bytes = (room + digests) * kPlace + floats * int64_t{sizeof(float)};
      const bool fast = vector && bytes <= cuda.shared_limit();
      args.pixels = static_cast<int>(fast ? room : 0);
      args.digest_pixels = static_cast<int>(fast ? digests : 0);
      kernel(value, fast, dim3(static_cast<unsigned>(blocks * args.groups)),
             static_cast<size_t>(fast ? bytes : least));
    });
  }

  int64_t pixels() const { return pixels_; }
  // Digests whose windows reach into a tile.
  int64_t digest_pixels() const {
    if (args.digests.data == nullptr) return 0;
    const auto span = [&](int tile, int most) {
      const int64_t reach = args.merge.window / 2;
      return std::min<int64_t>((tile - 1 + 2 * reach) / args.stride + 1, most);
    };
    return span(args.tile_h, args.digests.height) * span(args.tile_w, args.digests.width);
  }

 private:
  int64_t pixels_ = 0;

  Convolution convolution(const Tensor& weight) {
    STD_TORCH_CHECK(weight.size(2) < 1 << 15, "merge: windows must be smaller than 2^15");
    return {cuda.read(weight), static_cast<int>(weight.size(2))};
  }
};

std::tuple<Tensor, Tensor> merge_fwd(Tensor x, MaybeTensor merge_weight, Tensor enhance_weight,
                                     MaybeTensor enhance_bias, int64_t grid_h, int64_t grid_w,
                                     int64_t stride, int64_t prefix) {
  MergeCall call(x, merge_weight, enhance_weight, enhance_bias, {grid_h, grid_w, stride, prefix});
  Args& a = call.args;
  Tensor digests = call.cuda.empty(call.digest_sizes(), x.scalar_type());
  Tensor enhanced = call.cuda.empty(call.token_sizes(), x.scalar_type());
  if (call.empty()) return {digests, enhanced};
  a.to_digests = call.cuda.write(digests);
  a.to_tokens = call.cuda.write(enhanced);
  call.set_tiles(std::max(a.merge.window, a.enhance.window) / 2);
  call.launch(call.pixels(), 0, {a.enhance.window, a.merge.window}, 0, a.batch * a.tiles,
              [&](auto value, bool fast, dim3 grid, size_t bytes) {
                using T = decltype(value);
                const auto kernel =
                    fast ? merge_cuda::merge_forward<T, true> : merge_cuda::merge_forward<T, false>;
                call.cuda.launch(kernel, grid, merge_cuda::kThreads, bytes, a);
              });
  return {digests, enhanced};
}

Tensor input_gradient(MergeCall& call) {
  Args& a = call.args;
  Tensor grad_x = call.cuda.empty(call.token_sizes(), call.x.scalar_type());
  a.to_tokens = call.cuda.write(grad_x);
  const bool enhancing = a.enhanced.data != nullptr;
  call.set_tiles(enhancing ? a.enhance.window / 2 : 0);
  call.launch(enhancing ? call.pixels() : 0, call.digest_pixels(),
              {a.enhance.window, a.merge.window}, 0, a.batch * a.tiles,
              [&](auto value, bool fast, dim3 grid, size_t bytes) {
                using T = decltype(value);
                const auto kernel = fast ? merge_cuda::merge_input_gradient<T, true>
                                         : merge_cuda::merge_input_gradient<T, false>;
                call.cuda.launch(kernel, grid, merge_cuda::kThreads, bytes, a);
              });
  return grad_x;
}

// Gradients of the weights and of the bias: of those whose output has a gradient, else zeros, of no
// size for None.
std::tuple<Tensor, Tensor, Tensor> weight_gradients(MergeCall& call) {
  constexpr int64_t kShares = 64;  // at most
  Args& a = call.args;
  const ScalarType dtype = call.x.scalar_type();
  const bool merging = a.digests.data != nullptr, enhancing = a.enhanced.data != nullptr;
  call.set_tiles(std::max(merging ? a.merge.window : 0, enhancing ? a.enhance.window : 0) / 2);
  a.shares = static_cast<int>(std::min(a.batch * a.tiles, kShares));
  const auto parts_of = [&](const MaybeTensor& like, bool wanted, float*& to) {
    std::vector<int64_t> sizes{0};
    if (like.has_value() && wanted) {
      sizes[0] = a.shares;
      for (int64_t i = 0; i < like->dim(); ++i) sizes.push_back(like->size(i));
    }
    Tensor parts = call.cuda.empty(sizes, ScalarType::Float);
    to = parts.numel() > 0 ? static_cast<float*>(call.cuda.write(parts)) : nullptr;
    return parts;
  };
  const Tensor merge = parts_of(call.merge, merging, a.merge_parts);
  const Tensor enhance = parts_of(call.enhance, enhancing, a.enhance_parts);
  const Tensor bias = parts_of(call.bias, enhancing, a.bias_parts);
  call.launch(call.pixels(), 0, {a.merge.window, a.enhance.window}, merge_cuda::kRowSumBytes,
              a.shares, [&](auto value, bool fast, dim3 grid, size_t bytes) {
                using T = decltype(value);
                const auto kernel = fast ? merge_cuda::merge_weight_gradients<T, true>
                                         : merge_cuda::merge_weight_gradients<T, false>;
                call.cuda.launch(kernel, grid, merge_cuda::kThreads, bytes, a);
              });
  const auto sum = [&](const MaybeTensor& like, const Tensor& parts) {
    if (!like.has_value()) return call.cuda.empty({0}, dtype);
    if (parts.numel() > 0) return sum_parts(call.cuda, parts, dtype);
    const auto sizes = like->sizes();
    return torch::stable::new_zeros(*like, {sizes.begin(), sizes.end()});
  };
  return {sum(call.merge, merge), sum(call.enhance, enhance), sum(call.bias, bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_bwd(
    MaybeTensor grad_digests, MaybeTensor grad_enhanced, Tensor x, MaybeTensor merge_weight,
    Tensor enhance_weight, MaybeTensor enhance_bias, int64_t grid_h, int64_t grid_w, int64_t stride,
    int64_t prefix) {
  MergeCall call(x, merge_weight, enhance_weight, enhance_bias, {grid_h, grid_w, stride, prefix});
  Args& a = call.args;
  if (!call.merge.has_value()) grad_digests = std::nullopt;  // of an empty output
  if (call.empty()) {
    const auto zeros = [&](const MaybeTensor& like) {
      if (!like.has_value()) return call.cuda.empty({0}, x.scalar_type());
      const auto sizes = like->sizes();
      return torch::stable::new_zeros(*like, {sizes.begin(), sizes.end()});
    };
    return {call.cuda.empty(call.token_sizes(), x.scalar_type()), zeros(merge_weight),
            zeros(enhance_weight), zeros(enhance_bias)};
  }
  call.read_gradient(grad_digests, call.digest_sizes(), a.digests);
  call.read_gradient(grad_enhanced, call.token_sizes(), a.enhanced);
  Tensor grad_x = input_gradient(call);
  auto [grad_merge, grad_enhance, grad_bias] = weight_gradients(call);
  return {grad_x, grad_merge, grad_enhance, grad_bias};
}

}  // namespace
}  // namespace xattn

XATTN_CUDA_OPS(m) {
  m.impl("merge_fwd", TORCH_BOX(&xattn::merge_fwd));
  m.impl("merge_bwd", TORCH_BOX(&xattn::merge_bwd));
}
