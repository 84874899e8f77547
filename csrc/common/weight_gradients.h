// What the host files of operators with depthwise weights share: the table of channels and the
// gradients of weights as partial sums.
#pragma once

#include <algorithm>
#include <utility>

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

// Gradients of weights and biases, kCount of them: the work is cut into chunks, some images of one
// group of channels, each with sums of its own. How it is cut depends on the sizes alone, so that
// the order of every sum does too.
template <size_t kCount>
class WeightGradients {
 public:
  // sizes: values of each, 0 where there is none.
  WeightGradients(const Tensor& like, int64_t batch, int64_t groups, const int64_t (&sizes)[kCount])
      : like_(like), parts_(std::clamp<int64_t>(batch, 1, (kChunks + groups - 1) / groups)) {
    for (const int64_t values : sizes) {
      sums_.push_back(torch::stable::new_zeros(like_, std::vector<int64_t>{parts_, values},
                                               compute_type(dtype_of(like_))));
    }
  }

  // Calls run(chunks, count, scratch) on all threads, for all chunks in groups of neighbours; a
  // group of channels comes with one set of images after the other. A chunk is group, first image,
  // end of the images, then where each sum goes, or null.
  template <class Chunk, class F>
  void for_chunks(int64_t batch, int64_t groups, int64_t scratch_bytes, F run) {
    std::vector<Chunk> chunks;
    for (int64_t i = 0; i < groups * parts_; ++i) {
      const int64_t part = i % parts_;
      chunks.push_back(chunk<Chunk>(i / parts_, part, part * batch / parts_,
                                    (part + 1) * batch / parts_,
                                    std::make_index_sequence<kCount>{}));
    }
    torch::stable::parallel_for(0, groups * parts_, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(scratch_bytes);
      run(chunks.data() + begin, end - begin, scratch.get());
    });
  }

  // Gradient i: flat, of `like`'s dtype; empty where there is none.
  Tensor sum(size_t i) const {
    return sums_[i].size(1) ? sum_parts(sums_[i], like_) : empty_for(like_, {0});
  }

 private:
  static constexpr int64_t kChunks = 32;
  Tensor like_;
  int64_t parts_;
  std::vector<Tensor> sums_;  // [parts, values] of the compute type

  template <class Chunk, size_t... I>
  Chunk chunk(int64_t group, int64_t part, int64_t begin, int64_t end, std::index_sequence<I...>) {
    return {group, begin, end, row(I, part)...};
  }
  void* row(size_t i, int64_t part) {
    const int64_t bytes = sums_[i].size(1) * compute_bytes(dtype_of(like_));
    return bytes ? static_cast<char*>(sums_[i].mutable_data_ptr()) + part * bytes : nullptr;
  }
};

}  // namespace xattn
