// Depthwise convolutions on CUDA, host side: one call's kernels spread for the device, and their
// gradients.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "cuda_call.h"
#include "depthwise_gradients.cuh"

namespace xattn {

// Whether all rows of the last dimension, which is dense, are whole vectors of 16 bytes.
inline bool in_vectors(const Tensor& t) {
  const auto bytes = static_cast<int64_t>(t.element_size());
  const int64_t last = t.dim() - 1;
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  if (t.size(last) * bytes % 16 != 0) return false;
  for (int64_t i = 0; i < last; ++i) {
    if (t.size(i) > 1 && t.stride(i) * bytes % 16 != 0) return false;
  }
  return true;
}

class DepthwiseCuda {
 public:
  // weight: all groups' kernels, flat; bias: [channels]. Group g has channels[g] with a square
  // window of windows[g].
  DepthwiseCuda(CudaCall& call, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::vector<int64_t>& windows, const std::vector<int64_t>& channels)
      : weight_(weight), bias_(bias) {
    int64_t first = 0, place = 0;
    for (size_t g = 0; g < windows.size(); ++g) {
      add_group(first, channels[g], windows[g], place);
      first += channels[g];
      place += channels[g] * windows[g] * windows[g];
      largest_ = std::max({largest_, windows[g], int64_t{3}});  // what the ring's kernels take
    }
    if (first == 0) return;
    const int64_t width = (first + 7) / 8 * 8;
    add_group(first, width - first, 0, place);
    spread(call, width);
  }

  int64_t largest() const { return largest_; }  // 0: no convolution
  const TapTable& table() const { return table_; }

  // Gradients of the flat weight and of the bias (empty without one). args: the activations, their
  // batch and whether they can be read as vectors.
  std::tuple<Tensor, Tensor> gradients(CudaCall& call, TapGradientArgs args, int64_t prefix,
                                       int64_t height, int64_t width, int64_t channels) const {
    using torch::headeronly::ScalarType;
    const auto out = weight_.scalar_type();
    const auto bytes = static_cast<int64_t>(weight_.element_size());
    args.bands = cut_channels(channels, bytes, args.vector);
    args.taps = table_;
    args.weights = weight_.numel();
    const int64_t units = std::max<int64_t>(1, args.batch * args.bands.count);
    args.plan =
        plan_strips(prefix, height, width, largest_, units, std::numeric_limits<int64_t>::max());
    const int64_t runs = args.plan.ring ? 1 : largest_ * ((largest_ + kTapRun - 1) / kTapRun);
    const int64_t parts = args.batch * (args.plan.ring ? args.plan.blocks() : height);
    args.shares = static_cast<int>(
        std::clamp<int64_t>(kBlocks / (runs * args.bands.count), 1, std::max<int64_t>(1, parts)));
    Tensor weights = call.empty({args.shares, args.weights}, ScalarType::Float);
    Tensor biases = call.empty({args.shares, bias_.has_value() ? channels : 0}, ScalarType::Float);
    args.weight_shares = static_cast<float*>(call.write(weights));
    if (bias_.has_value()) args.bias_shares = static_cast<float*>(call.write(biases));
    for_storage(dtype_of(weight_), [&](auto type) {
      using T = decltype(type);
      const auto grid = static_cast<unsigned>(runs * args.bands.count * args.shares);
      if (args.plan.ring) {
        call.launch(&sum_tap_gradients<T>, dim3(grid), kStripThreads,
                    tap_gradient_shared(args.plan, largest_, sizeof(T)), args);
      } else {
        call.launch(&sum_tap_gradients_of_any<T>, dim3(grid), kStripThreads, 0, args);
      }
    });
    return {sum_parts(call, weights, out),
            bias_.has_value() ? sum_parts(call, biases, out) : call.empty({0}, out)};
  }

 private:
  static constexpr int64_t kBlocks = 512;  // whose shares are added

  struct Group {
    int64_t first, channels, window, place;
  };

  void add_group(int64_t first, int64_t channels, int64_t window, int64_t place) {
    groups_.push_back({first, channels, window, place});
  }

  void spread(CudaCall& call, int64_t width) {
    using torch::headeronly::ScalarType;
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

  Tensor weight_;
  std::optional<Tensor> bias_;
  std::optional<Tensor> taps_, places_;  // what the table points into
  std::vector<Group> groups_;
  int64_t largest_ = 0;
  TapTable table_{};
};

}  // namespace xattn
