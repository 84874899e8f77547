// What the host files of the CUDA operators share: one call of an operator, on a tensor's device
// and its current stream. Nothing here waits for the device or reads its memory.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"
#include "tensors.h"

#if defined(CUDA_HOST)
#include "cuda_host_call.h"  // CudaCall of the emulator, see tests/emulation
#define XATTN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(XATTN_EMULATED_OPS, CPU, m)
#else
#define XATTN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CUDA, m)

// torch's header declares it under USE_CUDA alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace xattn {

// Kernels get their memory from here, so that the emulator knows what they may touch.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& first)
      : first_(first), device_(first.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Memory that kernels read, of any strides; null where there is none.
  const void* read(const Tensor& t) const { return checked(t).const_data_ptr(); }
  const void* read(const std::optional<Tensor>& t) const {
    return t.has_value() ? read(*t) : nullptr;
  }
  // Memory that kernels write, and may read once it is written.
  void* write(Tensor& t) const { return checked(t).mutable_data_ptr(); }

  // An uninitialised tensor. What has to begin as zeros comes from torch::stable::new_zeros.
  Tensor empty(std::vector<int64_t> sizes, torch::headeronly::ScalarType dtype) const {
    return torch::stable::new_empty(first_, sizes, dtype);
  }

  // A grid without blocks launches nothing.
  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
              Args... args) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    check(xattn::launch(kernel, grid, dim3(threads), shared_bytes, stream_, args...));
  }

  // Bytes of shared memory that a block may ask for on this card.
  int64_t shared_limit() const {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    return bytes;
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "xattn_ops: CUDA error: ", cudaGetErrorString(error));
  }
  const Tensor& checked(const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_,
                    "xattn_ops: every tensor must be on the device of the first");
    return t;
  }

  Tensor first_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace xattn
#endif

namespace xattn {

// f(a value of the storage type).
template <class F>
auto for_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat16:
      return f(__half{});
    case Dtype::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "xattn_ops: CUDA kernels take float32, bfloat16 or float16");
  }
}

// Partial sums [parts, ...] in float32 as one tensor [...] of dtype `out`: added in double and in
// an order that depends on the number of parts alone.
Tensor sum_parts(CudaCall& call, const Tensor& parts, torch::headeronly::ScalarType out);

}  // namespace xattn
