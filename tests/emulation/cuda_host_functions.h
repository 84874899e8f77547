// CUDA's device functions that host headers lack. The caller's line is a default argument, which
// survives inlining and unrolling.
#pragma once

#include <cmath>

#define CALLER int line = __builtin_LINE()

inline void __syncthreads(CALLER) { cuda_host::block_barrier(0, line); }
inline int __syncthreads_count(int p, CALLER) { return cuda_host::block_barrier(p != 0, line); }
inline int __syncthreads_or(int p, CALLER) { return cuda_host::block_barrier(p != 0, line) != 0; }
inline int __syncthreads_and(int p, CALLER) { return cuda_host::block_barrier(p == 0, line) == 0; }
inline void __syncwarp(unsigned mask = ~0u, CALLER) { cuda_host::warp_barrier(mask, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { cuda_host::fault("__trap()"); }

// Shuffles within groups of `width` lanes; from outside the group a lane gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CALLER) {
  const int lane = cuda_host::self->lane;
  source = lane / width * width + (source & (width - 1));
  return cuda_host::shuffle("shfl", mask, value, source, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CALLER) {
  const int lane = cuda_host::self->lane, other = lane ^ bits;
  const int source = other / width > lane / width ? lane : other;
  return cuda_host::shuffle("shfl_xor", mask, value, source, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, CALLER) {
  const int lane = cuda_host::self->lane;
  const int source = lane % width + distance < width ? lane + distance : lane;
  return cuda_host::shuffle("shfl_down", mask, value, source, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, CALLER) {
  const int lane = cuda_host::self->lane;
  const int source = lane % width >= distance ? lane - distance : lane;
  return cuda_host::shuffle("shfl_up", mask, value, source, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, CALLER) {
  return cuda_host::ballot(mask, p, line);
}
inline int __any_sync(unsigned mask, int p, CALLER) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, CALLER) { return __ballot_sync(mask, !p, line) == 0; }
#undef CALLER

template <class T>
T atomicAdd(T* p, T v) {
  return cuda_host::atomic(p, [=](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMax(T* p, T v) {
  return cuda_host::atomic(p, [=](T old) { return old < v ? v : old; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

// The device's are approximate, to a few units in the last place.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __saturatef(float x) { return x < 0 ? 0.0f : x > 1 ? 1.0f : x; }

template <class To, class From>
To cuda_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_host_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_host_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

#define CUDA_HOST_MIN_MAX(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_HOST_MIN_MAX(int)
CUDA_HOST_MIN_MAX(unsigned)
CUDA_HOST_MIN_MAX(long)
CUDA_HOST_MIN_MAX(unsigned long)
CUDA_HOST_MIN_MAX(long long)
CUDA_HOST_MIN_MAX(unsigned long long)
#undef CUDA_HOST_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
