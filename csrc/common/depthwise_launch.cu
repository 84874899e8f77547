// The launches of depthwise convolutions that operators share, see depthwise_launch.h.
#include "depthwise_launch.h"

#include <limits>

#include "depthwise_gradients.cuh"

namespace xattn {

using torch::headeronly::ScalarType;

bool in_vectors(const Tensor& t) {
  const auto bytes = static_cast<int64_t>(t.element_size());
  const int64_t last = t.dim() - 1;
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  if (t.size(last) * bytes % 16 != 0) return false;
  for (int64_t i = 0; i < last; ++i) {
    if (t.size(i) > 1 && t.stride(i) * bytes % 16 != 0) return false;
  }
  return true;
}

DepthwiseCuda::DepthwiseCuda(CudaCall& call, const Tensor& weight,
                             const std::optional<Tensor>& bias, const std::vector<int64_t>& windows,
                             const std::vector<int64_t>& channels)
    : weight_(weight), bias_(bias) {
  constexpr int64_t kLeast = 3;  // what the kernels of the ring take
  int64_t first = 0, place = 0;
  for (size_t g = 0; g < windows.size(); ++g) {
    groups_.push_back({first, channels[g], windows[g], place});
    first += channels[g];
    place += channels[g] * windows[g] * windows[g];
    largest_ = std::max({largest_, windows[g], kLeast});
  }
  if (first == 0) return;
  const int64_t width = (first + 7) / 8 * 8;
  groups_.push_back({first, width - first, 0, place});
  spread(call, width);
}

void DepthwiseCuda::spread(CudaCall& call, int64_t width) {
  const int64_t rows = largest_ * largest_ + 1;
  taps_ = call.empty({rows, width}, ScalarType::Float);
  places_ = call.empty({2, width}, ScalarType::Int);
  auto* const taps = static_cast<float*>(call.write(*taps_));
  auto* const windows = static_cast<int*>(call.write(*places_));
  table_ = {taps, windows, windows + width, static_cast<int>(width), static_cast<int>(largest_)};
  const void *weight = call.read(weight_), *bias = call.read(bias_);
  for (size_t begin = 0; begin < groups_.size(); begin += TapGroups::kMost) {
    TapGroups some{};
    int64_t channels = 0;
    for (size_t g = begin; g < groups_.size() && some.count < TapGroups::kMost; ++g) {
      const int i = some.count++;
      some.first[i] = static_cast<int>(groups_[g].first);
      some.channels[i] = static_cast<int>(groups_[g].channels);
      some.window[i] = static_cast<int>(groups_[g].window);
      some.place[i] = static_cast<int>(groups_[g].place);
      channels += groups_[g].channels;
    }
    const int64_t blocks = (rows * channels + kSpreadThreads - 1) / kSpreadThreads;
    for_storage(dtype_of(weight_), [&](auto type) {
      using T = decltype(type);
      call.launch(&spread_taps<T>, dim3(static_cast<unsigned>(blocks)), kSpreadThreads, 0,
                  static_cast<const T*>(weight), static_cast<const T*>(bias), taps, windows,
                  windows + width, some, static_cast<int>(width), static_cast<int>(largest_));
    });
  }
}

std::tuple<Tensor, Tensor> DepthwiseCuda::gradients(CudaCall& call,
                                                    const DepthwiseActivations& of) const {
  constexpr int64_t kBlocks = 512;  // whose shares are added
  const auto dtype = weight_.scalar_type();
  TapGradientArgs a{};
  a.grad = of.grad;
  a.values = of.values;
  for (int i = 0; i < 2; ++i) {
    a.grad_stride[i] = of.grad_stride[i];
    a.value_stride[i] = of.value_stride[i];
  }
  a.batch = of.batch;
  a.vector = of.vector;
  a.weights = weight_.numel();
  a.taps = table_;
  a.bands = cut_channels(of.channels, static_cast<int64_t>(weight_.element_size()), of.vector);
  // The sums' order is the same on every card: a ring of any window that has one fits all.
  a.plan = plan_strips(of.prefix, of.height, of.width, largest_,
                       std::max<int64_t>(1, of.batch * a.bands.count),
                       std::numeric_limits<int64_t>::max());
  const int64_t runs = a.plan.ring ? 1 : largest_ * ((largest_ + kTapRun - 1) / kTapRun);
  const int64_t units = of.batch * (a.plan.ring ? a.plan.blocks() : of.height);
  a.shares = static_cast<int>(
      std::clamp<int64_t>(kBlocks / (runs * a.bands.count), 1, std::max<int64_t>(1, units)));
  Tensor weights = call.empty({a.shares, a.weights}, ScalarType::Float);
  Tensor biases = call.empty({a.shares, bias_.has_value() ? of.channels : 0}, ScalarType::Float);
  a.weight_shares = static_cast<float*>(call.write(weights));
  if (bias_.has_value()) a.bias_shares = static_cast<float*>(call.write(biases));
  const dim3 grid(static_cast<unsigned>(runs * a.bands.count * a.shares));
  for_storage(dtype_of(weight_), [&](auto type) {
    using T = decltype(type);
    if (a.plan.ring) {
      call.launch(&sum_tap_gradients<T>, grid, kStripThreads,
                  tap_gradient_shared(a.plan, static_cast<int>(largest_), sizeof(T)), a);
    } else {
      call.launch(&sum_tap_gradients_of_any<T>, grid, kStripThreads, 0, a);
    }
  });
  return {sum_parts(call, weights, dtype),
          bias_.has_value() ? sum_parts(call, biases, dtype) : call.empty({0}, dtype)};
}

}  // namespace xattn
