// Storage types of the CUDA kernels (float, __half, __nv_bfloat16) and reductions of a warp. All
// arithmetic is in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace xattn {

constexpr float kLog2e = 1.44269504f;  // softmax in powers of two: exp(x) = exp2(x log2(e))
constexpr float kLn2 = 0.69314718f;    // and what its gradient owes
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
constexpr bool kIsBf16 = std::is_same_v<T, __nv_bfloat16>;
template <class T>
constexpr bool kIsShort = sizeof(T) == 2;

XATTN_DEVICE float to_float(float x) { return x; }
XATTN_DEVICE float to_float(__half x) { return __half2float(x); }
XATTN_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
XATTN_DEVICE T from_float(float x) {
  if constexpr (kIsBf16<T>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (kIsShort<T>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// kCount neighbouring values, loaded and stored as one.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

// Two values of a short type in a register, the first one low.
template <class T>
XATTN_DEVICE uint32_t pack_pair(float low, float high) {
  static_assert(kIsShort<T>);
  const Pack<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// Over the 4 lanes that share a row of a product, and over the warp; every lane gets the result.
template <int kFrom, int kTo, class Op>
XATTN_DEVICE float fold_lanes(float x, Op op) {
#pragma unroll
  for (int distance = kFrom; distance < kTo; distance *= 2) {
    x = op(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  return x;
}
struct SumOf {
  XATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct MaxOf {
  XATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
XATTN_DEVICE float quad_sum(float x) { return fold_lanes<1, 4>(x, SumOf{}); }
XATTN_DEVICE float quad_max(float x) { return fold_lanes<1, 4>(x, MaxOf{}); }
XATTN_DEVICE float warp_sum(float x) { return fold_lanes<1, 32>(x, SumOf{}); }
XATTN_DEVICE float warp_max(float x) { return fold_lanes<1, 32>(x, MaxOf{}); }

}  // namespace xattn
