// Ops for the tests alone, over what the operators' kernels share: each instruction, a product by
// mma.cuh, the dropout mask, sum_parts.
#include "common/cuda_call.h"
#include "common/mma.cuh"
#include "common/philox.cuh"

namespace xattn {
namespace {

// a [32, 4], b [32, 2], c [32, 4]: the registers of each lane; depth 16 or, of tf32, 8.
template <int kKind>  // 0 tf32, 1 float16, 2 bfloat16
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int l = threadIdx.x;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[l * 4 + i];
  if constexpr (kKind == 0) {
    ptx::mma_m16n8k8_tf32(d, a + l * 4, b + l * 2);
  } else {
    ptx::mma_m16n8k16<kKind == 2>(d, a + l * 4, b + l * 2);
  }
  for (int i = 0; i < 4; ++i) out[l * 4 + i] = d[i];
}

Tensor mma(Tensor a, Tensor b, Tensor c, int64_t kind) {
  CudaCall call(a);
  Tensor out = call.empty({32, 4}, torch::headeronly::ScalarType::Float);
  const auto kernel = kind == 0 ? mma_kernel<0> : kind == 1 ? mma_kernel<1> : mma_kernel<2>;
  call.launch(kernel, dim3(1), 32, 0, static_cast<const uint32_t*>(call.read(a)),
              static_cast<const uint32_t*>(call.read(b)), static_cast<const float*>(call.read(c)),
              static_cast<float*>(call.write(out)));
  return out;
}

// rows [32, 8] of 16-bit values -> registers [32, 4]; those that the variant has not are 0.
template <int kCount, bool kTransposed>
__global__ void ldmatrix_kernel(const uint16_t* rows, uint32_t* out) {
  constexpr int kStride = 24;
  SHARED(uint16_t, s, [32 * kStride]);
  const int l = threadIdx.x;
  for (int i = 0; i < 8; ++i) s[l * kStride + i] = rows[l * 8 + i];
  __syncwarp();
  uint32_t r[4] = {};
  ptx::ldmatrix<kCount, kTransposed>(r, s + l * kStride);
  for (int i = 0; i < 4; ++i) out[l * 4 + i] = r[i];
}

Tensor ldmatrix(Tensor rows, int64_t count, bool transposed) {
  CudaCall call(rows);
  Tensor out = call.empty({32, 4}, torch::headeronly::ScalarType::Int);
  const auto two = transposed ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>;
  const auto four = transposed ? ldmatrix_kernel<4, true> : ldmatrix_kernel<4, false>;
  call.launch(count == 2 ? two : four, dim3(1), 32, 0,
              static_cast<const uint16_t*>(call.read(rows)),
              static_cast<uint32_t*>(call.write(out)));
  return out;
}

// [11, 32]: each exchange within a warp, by lane.
__global__ void exchanges_kernel(int* out) {
  const int t = threadIdx.x;
  int row = 0;
  const auto put = [&](int value) { out[row++ * 32 + t] = value; };
  put(__shfl_xor_sync(~0u, t, 5));
  put(__shfl_down_sync(~0u, t, 3));
  put(__shfl_up_sync(~0u, t, 3, 8));
  put(__shfl_sync(~0u, t, 2, 8));
  put(__shfl_xor_sync(~0u, t, 12, 8));
  put(static_cast<int>(__ballot_sync(~0u, t % 3 == 0)));
  int halves = 0;  // apart, with a mask each
  if (t < 16) {
    halves = __shfl_xor_sync(0x0000ffffu, t, 8);
  } else {
    halves = __shfl_xor_sync(0xffff0000u, t, 4);
  }
  put(halves);
  put(__any_sync(~0u, t == 7) * 2 + __all_sync(~0u, t < 31));
  put(__syncthreads_count(t < 11));
  put(__syncthreads_or(t == 3) * 2 + __syncthreads_and(t < 31));
  put(static_cast<int>(warp_sum(static_cast<float>(t)) + warp_max(static_cast<float>(t))));
}

Tensor exchanges(Tensor like) {
  CudaCall call(like);
  Tensor out = call.empty({11, 32}, torch::headeronly::ScalarType::Int);
  call.launch(exchanges_kernel, dim3(1), 32, 0, static_cast<int*>(call.write(out)));
  return out;
}

// in [256] -> out reversed, through two groups of cp.async; in the second one every other piece of
// four is not valid, and so zero. 64 threads.
__global__ void copies_kernel(const float* in, float* out) {
  SHARED(float, s, [256]);
  const int t = threadIdx.x;
  ptx::cp_async<8>(s + t * 2, in + t * 2);
  ptx::cp_async_commit();
  if (t < 32) ptx::cp_async<16>(s + 128 + t * 4, in + 128 + t * 4, t % 2 == 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  for (int i = t; i < 128; i += 64) out[255 - i] = s[i];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = t; i < 128; i += 64) out[127 - i] = s[128 + i];
}

Tensor copies(Tensor in) {
  CudaCall call(in);
  Tensor out = call.empty({256}, torch::headeronly::ScalarType::Float);
  call.launch(copies_kernel, dim3(1), 64, 0, static_cast<const float*>(call.read(in)),
              static_cast<float*>(call.write(out)));
  return out;
}

// a [16, 16] or its transpose, b [16, 8] or its transpose -> a b [16, 8], by mma.cuh.
template <class T, bool kATransposed, bool kBTransposed>
__global__ void product_kernel(const T* a, const T* b, float* out) {
  constexpr int kStride = 24;
  SHARED(T, sa, [16 * kStride]);
  SHARED(T, sb, [16 * kStride]);
  const int l = threadIdx.x;
  for (int i = l; i < 256; i += 32) sa[i / 16 * kStride + i % 16] = a[i];
  constexpr int kColumns = kBTransposed ? 8 : 16;  // of b's rows in memory
  for (int i = l; i < 128; i += 32) sb[i / kColumns * kStride + i % kColumns] = b[i];
  __syncwarp();
  FragmentA<T> fa;
  FragmentB<T> fb;
  if constexpr (kATransposed) {
    load_a_transposed(fa, sa, kStride);
  } else {
    load_a(fa, sa, kStride);
  }
  if constexpr (kBTransposed) {
    load_b_transposed(fb, sb, kStride);
  } else {
    load_b(fb, sb, kStride);
  }
  float c[4] = {};
  multiply_add(c, fa, fb);
  const int row = l / 4, column = l % 4 * 2;
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = c[i];
}

Tensor product(Tensor a, Tensor b, bool a_transposed, bool b_transposed) {
  CudaCall call(a);
  Tensor out = call.empty({16, 8}, torch::headeronly::ScalarType::Float);
  for_storage(dtype_of(a), [&](auto value) {
    using T = decltype(value);
    const auto plain =
        b_transposed ? product_kernel<T, false, true> : product_kernel<T, false, false>;
    const auto other =
        b_transposed ? product_kernel<T, true, true> : product_kernel<T, true, false>;
    call.launch(a_transposed ? other : plain, dim3(1), 32, 0, static_cast<const T*>(call.read(a)),
                static_cast<const T*>(call.read(b)), static_cast<float*>(call.write(out)));
  });
  return out;
}

// What each weight [units, n_q, n_k] is multiplied by.
__global__ void keep_weights_kernel(Dropout dropout, float* out, int n_q, int n_k) {
  const int unit = blockIdx.x;
  for (int i = threadIdx.x; i < n_q * n_k; i += blockDim.x) {
    out[static_cast<int64_t>(unit) * n_q * n_k + i] =
        keep_weight(dropout, unit, i / n_k, i % n_k, n_k);
  }
}

Tensor keep_weights(Tensor seed, int64_t units, int64_t n_q, int64_t n_k, double p) {
  CudaCall call(seed);
  Tensor out = call.empty({units, n_q, n_k}, torch::headeronly::ScalarType::Float);
  call.launch(keep_weights_kernel, dim3(static_cast<unsigned>(units)), 64, 0,
              make_dropout(call.read(seed), p), static_cast<float*>(call.write(out)),
              static_cast<int>(n_q), static_cast<int>(n_k));
  return out;
}

Tensor sum_parts_like(Tensor parts, Tensor like) {
  CudaCall call(parts);
  return sum_parts(call, parts, like.scalar_type());
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_FRAGMENT(XATTN_EMULATED_OPS, m) {
  m.def("mma(Tensor a, Tensor b, Tensor c, int kind) -> Tensor");
  m.def("ldmatrix(Tensor rows, int count, bool transposed) -> Tensor");
  m.def("exchanges(Tensor like) -> Tensor");
  m.def("copies(Tensor x) -> Tensor");
  m.def("product(Tensor a, Tensor b, bool a_transposed, bool b_transposed) -> Tensor");
  m.def("keep_weights(Tensor seed, int units, int n_q, int n_k, float p) -> Tensor");
  m.def("sum_parts(Tensor parts, Tensor like) -> Tensor");
}

XATTN_CUDA_OPS(m) {
  m.impl("mma", TORCH_BOX(&xattn::mma));
  m.impl("ldmatrix", TORCH_BOX(&xattn::ldmatrix));
  m.impl("exchanges", TORCH_BOX(&xattn::exchanges));
  m.impl("copies", TORCH_BOX(&xattn::copies));
  m.impl("product", TORCH_BOX(&xattn::product));
  m.impl("keep_weights", TORCH_BOX(&xattn::keep_weights));
  m.impl("sum_parts", TORCH_BOX(&xattn::sum_parts_like));
}
