// One small kernel for each kind of fault that the emulator must catch. With `planted` false each
// is sound. All run as one block of 64 threads, unless said otherwise.
#include "common/ptx.cuh"
#include "faults.h"

#include <cuda_bf16.h>

#include <stdexcept>

namespace faults {

using xattn::launch;
namespace ptx = xattn::ptx;

constexpr int kThreads = 64;

// Dynamic shared memory, an element past its end.
__global__ void shared_bounds(const float*, float* out, bool planted) {
  SHARED_DYNAMIC(float, s);
  s[threadIdx.x + planted] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x > 0 ? threadIdx.x : planted];
}

// The same of a static array.
__global__ void static_bounds(const float*, float* out, bool planted) {
  SHARED(float, s, [kThreads]);
  s[threadIdx.x + planted] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = s[planted ? kThreads - 1 : threadIdx.x];
}

__global__ void read_bounds(const float* in, float* out, bool planted) {
  out[threadIdx.x] = in[threadIdx.x + planted];
}

__global__ void write_bounds(const float* in, float* out, bool planted) {
  out[threadIdx.x + planted] = in[threadIdx.x];
  if (planted && threadIdx.x == 0) out[0] = in[0];
}

__global__ void write_to_input(const float* in, float* out, bool planted) {
  out[threadIdx.x] = 1.0f;
  if (planted) const_cast<float*>(in)[threadIdx.x] = 2.0f;
}

// A pointer that no tensor of the call holds.
__global__ void wild_read(const float* in, float* out, bool planted) {
  out[threadIdx.x] = in[planted ? threadIdx.x + (1 << 14) : threadIdx.x];
}

// An element of shared memory that nobody wrote.
__global__ void uninitialised_shared(const float*, float* out, bool planted) {
  SHARED(float, s, [kThreads + 1]);
  s[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = 0.0f * s[threadIdx.x + planted];
}

__global__ void uninitialised_device(const float*, float* out, bool planted) {
  if (!planted) out[threadIdx.x] = 1.0f;
  out[threadIdx.x] += 1.0f;
}

// A result that no thread writes.
__global__ void unwritten(const float*, float* out, bool planted) {
  if (!planted || threadIdx.x != 5) out[threadIdx.x] = 1.0f;
}

__global__ void barrier_after_return(const float*, float* out, bool planted) {
  if (planted && threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(const float*, float* out, bool planted) {
  if (planted && threadIdx.x % 2 == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

// A shuffle of the whole warp in a branch that half of it takes.
__global__ void divergent_shuffle(const float*, float* out, bool planted) {
  float value = threadIdx.x;
  if (!planted || threadIdx.x % 32 < 16) value = __shfl_xor_sync(~0u, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

// A lane that its mask does not name.
__global__ void mask_without_lane(const float*, float* out, bool planted) {
  out[threadIdx.x] = __shfl_sync(planted ? 0xffffu : ~0u, 1.0f, 0);
}

// Others' values read without a barrier after they were written.
__global__ void read_after_write(const float*, float* out, bool planted) {
  SHARED(float, s, [kThreads]);
  s[threadIdx.x] = 0.0f;
  __syncthreads();
  s[threadIdx.x] = threadIdx.x;
  if (!planted) __syncthreads();
  out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

// A buffer overwritten while others may still read it.
__global__ void write_after_read(const float*, float* out, bool planted) {
  SHARED(float, s, [kThreads]);
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    sum += s[kThreads - 1 - threadIdx.x];
    if (!planted) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// A sum within a warp that trusts its lanes to go in step.
__global__ void lock_step(const float*, float* out, bool planted) {
  SHARED(float, s, [kThreads]);
  const int first = threadIdx.x & 32, lane = threadIdx.x & 31;
  s[threadIdx.x] = lane;
  __syncwarp();
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = lane < distance ? s[first + lane + distance] : 0.0f;
    if (!planted) __syncwarp();
    if (lane < distance) s[first + lane] += other;
    if (!planted) __syncwarp();
  }
  __syncwarp();
  out[threadIdx.x] = s[first];
}

// Two blocks that write the same place.
__global__ void two_blocks(const float*, float* out, bool) { out[threadIdx.x] = blockIdx.x; }

// cp.async read before it has landed.
__global__ void unwaited_copy(const float* in, float* out, bool planted) {
  SHARED(float, s, [4 * kThreads]);
  ptx::cp_async<16>(s + threadIdx.x * 4, in + threadIdx.x * 4);
  ptx::cp_async_commit();
  if (!planted) ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = s[4 * kThreads - 1 - threadIdx.x];
}

// Waited for by the thread that copied, read by others without a barrier.
__global__ void copy_without_barrier(const float* in, float* out, bool planted) {
  SHARED(float, s, [kThreads]);
  s[threadIdx.x] = 0.0f;
  __syncthreads();
  ptx::cp_async<4>(s + threadIdx.x, in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!planted) __syncthreads();
  out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

__global__ void misaligned_store(const float*, float* out, bool planted) {
  out[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 7) *reinterpret_cast<float2*>(out + 8 + planted) = make_float2(2.0f, 3.0f);
}

__global__ void misaligned_copy(const float* in, float* out, bool planted) {
  SHARED(float, s, [4]);
  if (threadIdx.x == 0) ptx::cp_async<16>(s, in + planted);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x % 4];
}

// A row of ldmatrix at no multiple of 16 bytes.
__global__ void misaligned_ldmatrix(const float*, float* out, bool planted) {
  constexpr int kStride = 72;
  SHARED(__nv_bfloat16, s, [16 * kStride + 8]);
  for (int i = threadIdx.x; i < 16 * kStride + 8; i += kThreads) s[i] = __float2bfloat16(1.0f);
  __syncthreads();
  uint32_t r[4];
  const int lane = threadIdx.x & 31;
  ptx::ldmatrix<4, false>(r, s + (lane & 15) * kStride + (lane >> 4) * 8 + 4 * planted);
  out[threadIdx.x] = __uint_as_float(r[0] << 16);
}

// An index past an array in registers.
__global__ void local_bounds(const float*, float* out, bool planted) {
  float values[4] = {1, 2, 3, 4}, sum = 0;
  for (int i = 0; i < 4 + planted; ++i) sum += values[(i + threadIdx.x * 0) & 7];
  out[threadIdx.x] = sum;
}

template <int kCounters>
__global__ void sum_without_atomic(const float*, float* out, bool planted) {
  SHARED(float, total, [kCounters]);
  if (threadIdx.x < kCounters) total[threadIdx.x] = 0;
  __syncthreads();
  float* mine = &total[threadIdx.x % kCounters];
  if (planted) {
    *mine += 1.0f;
  } else {
    atomicAdd(mine, 1.0f);
  }
  __syncthreads();
  out[threadIdx.x] = *mine;
}

// A launch that asks for more shared memory than a block can have.
__global__ void too_much_shared(const float*, float* out, bool) { out[threadIdx.x] = 1.0f; }

using Kernel = void (*)(const float*, float*, bool);

static const struct {
  const char* name;
  Kernel kernel;
} kKernels[] = {
#define FAULT(kernel) {#kernel, kernel}
    FAULT(shared_bounds),
    FAULT(static_bounds),
    FAULT(read_bounds),
    FAULT(write_bounds),
    FAULT(write_to_input),
    FAULT(wild_read),
    FAULT(uninitialised_shared),
    FAULT(uninitialised_device),
    FAULT(unwritten),
    FAULT(barrier_after_return),
    FAULT(two_barriers),
    FAULT(divergent_shuffle),
    FAULT(mask_without_lane),
    FAULT(read_after_write),
    FAULT(write_after_read),
    FAULT(lock_step),
    FAULT(two_blocks),
    FAULT(unwaited_copy),
    FAULT(copy_without_barrier),
    FAULT(misaligned_store),
    FAULT(misaligned_copy),
    FAULT(misaligned_ldmatrix),
    FAULT(local_bounds),
    FAULT(too_much_shared),
#undef FAULT
    {"sum_without_atomic", sum_without_atomic<4>},
};

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const auto& each : kKernels) all.emplace_back(each.name);
  return all;
}

void run(const std::string& name, const float* in, float* out, bool planted) {
  for (const auto& each : kKernels) {
    if (name != each.name) continue;
    size_t shared = name == "shared_bounds" ? kThreads * sizeof(float) : 0;
    if (name == "too_much_shared" && planted) shared = cuda_host::shared_limit() + 1;
    const int blocks = name == "two_blocks" && planted ? 2 : 1;
    launch(each.kernel, dim3(blocks), dim3(kThreads), shared, nullptr, in, out, planted);
    return;
  }
  throw std::invalid_argument("no such fault: " + name);
}

}  // namespace faults
