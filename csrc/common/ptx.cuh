// All inline PTX of the library, each instruction with the body that the emulator runs in its
// place.
#pragma once

#include "launch.cuh"

namespace xattn::ptx {

#if defined(CUDA_HOST)

using SharedAddress = uintptr_t;  // bytes, on both sides

XATTN_DEVICE SharedAddress shared_address(const void* p) { return (SharedAddress)p; }

// kCount 8x8 matrices of 16-bit values; lanes 8i .. 8i+7 give the addresses of matrix i's rows.
template <int kCount, bool kTransposed>
XATTN_DEVICE void ldmatrix(uint32_t* r, const void* row) {
  cuda_host::ldmatrix(r, shared_address(row), kCount, kTransposed);
}

// d [16, 8] += a [16, 16] b [16, 8] of bfloat16 (kBf16) or float16.
template <bool kBf16>
XATTN_DEVICE void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  cuda_host::mma_m16n8k16(d, a, b[0], b[1], kBf16);
}

// The same with a [16, 8] b [8, 8]: the first half of either.
template <bool kBf16>
XATTN_DEVICE void mma_m16n8k8(float* d, const uint32_t* a, const uint32_t* b) {
  const uint32_t padded[4] = {a[0], a[1], 0, 0};
  cuda_host::mma_m16n8k16(d, padded, b[0], 0, kBf16);
}

// d [16, 8] += a [16, 8] b [8, 8] of tf32.
XATTN_DEVICE void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  cuda_host::mma_m16n8k8_tf32(d, a, b[0], b[1]);
}

// The tf32 nearest to x, as the bits of a float.
XATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x1000) & 0xffffe000;
}

// Copies kBytes (4, 8, 16) in the background; where not `valid` reads nothing and writes zeros.
template <int kBytes>
XATTN_DEVICE void cp_async(void* shared, const void* global, bool valid = true) {
  cuda_host::cp_async(shared_address(shared), global, kBytes, valid ? kBytes : 0);
}
XATTN_DEVICE void cp_async_commit() { cuda_host::cp_async_commit(); }
// Until at most kPending of this thread's groups are on their way.
template <int kPending>
XATTN_DEVICE void cp_async_wait() {
  cuda_host::cp_async_wait(kPending);
}

XATTN_DEVICE float exp2(float x) { return exp2f(x); }

#else

using SharedAddress = uint32_t;

XATTN_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// The "memory" clobbers: without them the compiler may move plain shared stores across the loads.
template <int kCount, bool kTransposed>
XATTN_DEVICE void ldmatrix(uint32_t* r, const void* row) {
  const SharedAddress at = shared_address(row);
  if constexpr (kCount == 4 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (!kTransposed) {
    static_assert(kCount == 2);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else {
    static_assert(kCount == 2);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  }
}

// Products are pure: not volatile, so that the compiler may schedule them.
template <bool kBf16>
XATTN_DEVICE void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

template <bool kBf16>
XATTN_DEVICE void mma_m16n8k8(float* d, const uint32_t* a, const uint32_t* b) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
}

XATTN_DEVICE void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

XATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0,%1;" : "=r"(bits) : "f"(x));
  return bits;
}

template <int kBytes>
XATTN_DEVICE void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const SharedAddress to = shared_address(shared);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0],[%1],%2,%3;" ::"r"(to), "l"(global), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
XATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
XATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

XATTN_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace xattn::ptx
