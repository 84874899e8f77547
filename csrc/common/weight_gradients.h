// What the host files of operators with depthwise weights share: the table of channels and the
// gradients of weights as partial sums.
#pragma once

#include <algorithm>

#include "depthwise_weights.h"
#include "tensors.h"

namespace xattn {

// Window and offset of every channel, for weights that lie group after group.
struct DepthwiseTable {
  std::vector<int64_t> window, offset;
  int64_t size = 0;  // values of all weights
  int64_t largest = 0;

  // The next `channels` channels have windows of window x window.
  void add(int64_t channels, int64_t window) {
    for (int64_t c = 0; c < channels; ++c, size += window * window) {
      this->window.push_back(window);
      offset.push_back(size);
    }
    largest = std::max(largest, window);
  }
  int64_t channels() const { return static_cast<int64_t>(window.size()); }

  DepthwiseWeights weights(const Tensor& weight, const std::optional<Tensor>& bias) const {
    return {weight.const_data_ptr(), data_or_null(bias), window.data(), offset.data(), largest};
  }
};

// Gradients of weights and biases: the work is cut into chunks, some images of one group of
// channels, each with sums of its own. How it is cut depends on the sizes alone, so that the order
// of every sum does too.
class WeightGradients {
 public:
  WeightGradients(const Tensor& like, int64_t batch, int64_t groups, int64_t weights,
                  int64_t biases)
      : like_(like),
        parts_(std::clamp<int64_t>(batch, 1, (kChunks + groups - 1) / groups)),
        weights_(zeros(weights)),
        biases_(zeros(biases)) {}

  // Calls run(chunks, count, scratch) on all threads, for all chunks in groups of neighbours; a
  // group of channels comes with one set of images after the other.
  template <class Chunk, class F>
  void for_chunks(int64_t batch, int64_t groups, int64_t scratch_bytes, F run) {
    auto* weights = static_cast<char*>(weights_.mutable_data_ptr());
    auto* biases = static_cast<char*>(biases_.mutable_data_ptr());
    const int64_t value = compute_bytes(dtype_of(like_));
    const int64_t weight_row = weights_.size(1) * value, bias_row = biases_.size(1) * value;
    std::vector<Chunk> chunks;
    for (int64_t i = 0; i < groups * parts_; ++i) {
      const int64_t part = i % parts_;
      chunks.push_back({i / parts_, part * batch / parts_, (part + 1) * batch / parts_,
                        weights + part * weight_row,
                        bias_row ? biases + part * bias_row : nullptr});
    }
    torch::stable::parallel_for(0, groups * parts_, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(scratch_bytes);
      run(chunks.data() + begin, end - begin, scratch.get());
    });
  }

  // Flat, of `like`'s dtype; empty where there is none.
  Tensor weight() const { return sum(weights_); }
  Tensor bias() const { return sum(biases_); }

 private:
  static constexpr int64_t kChunks = 32;
  Tensor like_;
  int64_t parts_;
  Tensor weights_, biases_;  // [parts, values] of the compute type

  Tensor zeros(int64_t values) const {
    return torch::stable::new_zeros(like_, std::vector<int64_t>{parts_, values},
                                    compute_type(dtype_of(like_)));
  }
  Tensor sum(const Tensor& parts) const {
    return parts.size(1) ? sum_parts(parts, like_) : empty_for(like_, {0});
  }
};

}  // namespace xattn
