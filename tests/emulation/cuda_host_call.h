// CudaCall (csrc/common/cuda_call.h) over the emulator: tensors are on the CPU, and what the call
// gives its kernels is all the memory that they may touch, until the call ends.
#pragma once

#include <utility>
#include <vector>

namespace xattn {

class CudaCall {
 public:
  explicit CudaCall(const Tensor& first) : first_(first) { ++depth; }
  ~CudaCall() {
    if (--depth == 0) cuda_host::forget_given();
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  const void* read(const Tensor& t) {
    give(t, cuda_host::Given::kRead);
    return t.const_data_ptr();
  }
  const void* read(const std::optional<Tensor>& t) { return t.has_value() ? read(*t) : nullptr; }
  void* write(Tensor& t) {
    give(t, cuda_host::Given::kWritten);
    return t.mutable_data_ptr();
  }

  // Cut out of a larger one, for the margins.
  Tensor empty(std::vector<int64_t> sizes, torch::headeronly::ScalarType dtype) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    Tensor whole = torch::stable::new_empty(first_, {int64_t{1}}, dtype);
    const auto each = static_cast<int64_t>(whole.element_size());
    const int64_t margin = static_cast<int64_t>(cuda_host::kMargin) / each;
    whole = torch::stable::new_empty(first_, {count + 2 * margin}, dtype);
    Tensor part = torch::stable::view(torch::stable::narrow(whole, 0, margin, count), sizes);
    // A tensor without elements has no address of its own.
    cuda_host::give_fresh(static_cast<char*>(whole.mutable_data_ptr()) + cuda_host::kMargin,
                          static_cast<size_t>(count * each));
    kept_.push_back(part);
    return part;
  }

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
              Args... args) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    xattn::launch(kernel, grid, dim3(threads), shared_bytes, nullptr, args...);
  }

  int64_t shared_limit() const { return static_cast<int64_t>(cuda_host::shared_limit()); }

 private:
  // Element by element where the tensor has gaps: they are not its memory.
  void give(const Tensor& t, cuda_host::Given how) {
    STD_TORCH_CHECK(t.is_cpu(), "xattn_ops: the emulator takes CPU tensors");
    kept_.push_back(t);  // its memory must not become another tensor's during the call
    if (!cuda_host::checking() || t.numel() == 0) return;
    const auto each = static_cast<int64_t>(t.element_size());
    std::vector<std::pair<int64_t, int64_t>> axes;  // size, stride in bytes
    int64_t run = each;                             // bytes without a gap
    for (int64_t i = t.dim() - 1; i >= 0; --i) {
      const int64_t size = t.size(i), stride = t.stride(i) * each;
      if (size == 1 || stride == 0) continue;
      if (axes.empty() && stride == run) {
        run *= size;
      } else {
        axes.emplace_back(size, stride);
      }
    }
    give_axes(static_cast<const char*>(t.const_data_ptr()), axes, axes.size(), run, how);
  }
  static void give_axes(const char* p, const std::vector<std::pair<int64_t, int64_t>>& axes,
                        size_t left, int64_t run, cuda_host::Given how) {
    if (left == 0) return cuda_host::give(p, static_cast<size_t>(run), how);
    const auto [size, stride] = axes[left - 1];
    for (int64_t i = 0; i < size; ++i) give_axes(p + i * stride, axes, left - 1, run, how);
  }

  inline static int depth = 0;  // calls within calls share what they give
  Tensor first_;
  std::vector<Tensor> kept_;
};

}  // namespace xattn
