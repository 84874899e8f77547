// Runs CUDA C++ kernels on the CPU from their own source. For tests: the product never includes it.
//
//     g++ -std=c++17 -x c++ -include cuda_host.h ... kernel.cu
//
// A thread of a block is a fiber, blocks run one after the other, all on the thread that launches.
// A fiber runs until a barrier or an exchange within its warp. Types are CUDA's own. The rules that
// keep a kernel runnable here stand in csrc/common/launch.cuh; breaking one does not compile.
#pragma once

#define CUDA_HOST 1

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__  // of a plain __shared__ variable every fiber would have its own
#define __shared__ take_it_from_SHARED_or_SHARED_DYNAMIC

#define threadIdx (cuda_host::self->index)
#define blockIdx cuda_host::block_index
#define blockDim cuda_host::block_dim
#define gridDim cuda_host::grid_dim
#define warpSize 32

namespace cuda_host {

struct Thread {
  uint3 index;
  int linear, lane, warp;
};
extern Thread* self;  // the fiber that runs
extern uint3 block_index;
extern dim3 block_dim, grid_dim;

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
};
// Runs the grid; throws std::runtime_error where a kernel is at fault.
void run_grid(const Launch& launch, void (*body)(void*), void* argument);
template <class F>
void run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, F body) {
  run_grid({kernel, grid, block, dynamic_bytes}, [](void* f) { (*static_cast<F*>(f))(); }, &body);
}
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ------------------------------------------------------------------------- memory

void* dynamic_shared();
void* static_shared(const void* site, size_t bytes, size_t align);  // the same one for every fiber

// What a call gives its kernels: memory that they read, write as well, or find unwritten.
bool checking();  // whether every access is checked against it
enum class Given { kRead, kWritten, kFresh };
void give(const void* p, size_t bytes, Given how);
// Bytes before and after fresh memory in which no kernel may write.
constexpr size_t kMargin = 512;
void give_fresh(void* p, size_t bytes);  // with margins around it
void forget_given();
size_t shared_limit();  // bytes of shared memory that a block may have

// --------------------------------------------------------- barriers and exchanges

int block_barrier(int predicate, int line);  // how many threads have predicate != 0
void warp_barrier(unsigned mask, int line);
unsigned ballot(unsigned mask, int predicate, int line);

struct Exchange {
  uint64_t in, out;
  int source;
};
void exchange(const char* name, unsigned mask, int line, Exchange& e);

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8);
  Exchange e{0, 0, source};
  memcpy(&e.in, &value, sizeof(T));
  exchange(name, mask, line, e);
  memcpy(&value, &e.out, sizeof(T));
  return value;
}

// ---------------------------------------------------- bodies of csrc/common/ptx.cuh

void ldmatrix(uint32_t* r, uintptr_t address, int count, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void cp_async(uintptr_t shared, const void* global, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int pending);

// ------------------------------------------------------------------------- atomics

void before_atomic(const void* p, size_t bytes);
template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic(T* p, F change) {
  before_atomic(p, sizeof(T));
  const T old = *p;
  *p = change(old);
  return old;
}

}  // namespace cuda_host

#include "cuda_host_functions.h"
