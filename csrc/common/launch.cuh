// How CUDA kernels get shared memory and are launched.
//
// The same sources run on the host under the emulator of tests/emulation, which is test-only and
// included before everything (CUDA_HOST is then defined). Three rules keep a kernel runnable there:
// shared memory through SHARED and SHARED_DYNAMIC, launches through `launch`, PTX only in ptx.cuh.
#pragma once

#if !defined(CUDA_HOST)
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

#define XATTN_DEVICE __device__ __forceinline__

namespace xattn {

#if defined(CUDA_HOST)

// SHARED(float, tile, [16][8]): one object for a block and a place in the source.
#define SHARED(type, name, dims)     \
  using name##_type = type dims;     \
  static const char name##_site = 0; \
  name##_type& name = *(name##_type*)cuda_host::static_shared(&name##_site, sizeof(name##_type), 16)
#define SHARED_DYNAMIC(type, name) type* const name = (type*)cuda_host::dynamic_shared()

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Args... args) {
  // Throws on a fault.
  cuda_host::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                 [&] { kernel(Params(args)...); });
  return cudaSuccess;
}

#else

#define SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define SHARED_DYNAMIC(type, name)                           \
  extern __shared__ __align__(128) unsigned char dynamic_[]; \
  type* const name = reinterpret_cast<type*>(dynamic_)

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  if (shared_bytes > 48 * 1024) {  // more must be asked for
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

#endif

}  // namespace xattn
