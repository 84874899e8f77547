// Partial sums added up on the device, see cuda_call.h.
#include "cuda_call.h"

namespace xattn {
namespace {

constexpr int kColumns = 32, kRows = 8;  // of a block

// out[i] = sum of parts[p][i]: row r of a block adds the parts p = r, r + kRows, ..., and the first
// row adds the rows.
template <class T>
__global__ void __launch_bounds__(kColumns* kRows)
    sum_parts_kernel(const float* __restrict__ parts, T* __restrict__ out, int64_t count,
                     int64_t each) {
  SHARED(double, sums, [kRows][kColumns]);
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  double sum = 0;
  if (i < each) {
#pragma unroll 4
    for (int64_t p = row; p < count; p += kRows) sum += parts[p * each + i];
  }
  sums[row][column] = sum;
  __syncthreads();
  if (row > 0 || i >= each) return;
  for (int r = 1; r < kRows; ++r) sum += sums[r][column];
  out[i] = from_float<T>(static_cast<float>(sum));
}

}  // namespace

Tensor sum_parts(CudaCall& call, const Tensor& parts, torch::headeronly::ScalarType out) {
  STD_TORCH_CHECK(parts.dim() > 0 && parts.is_contiguous() && dtype_of(parts) == Dtype::kFloat32,
                  "xattn_ops: partial sums must be contiguous float32");
  const auto sizes = parts.sizes();
  Tensor total = call.empty({sizes.begin() + 1, sizes.end()}, out);
  const int64_t each = total.numel(), blocks = (each + kColumns - 1) / kColumns;
  for_storage(dtype_of(total), [&](auto value) {
    using T = decltype(value);
    call.launch(sum_parts_kernel<T>, dim3(static_cast<unsigned>(blocks)), kColumns * kRows, 0,
                static_cast<const float*>(call.read(parts)), static_cast<T*>(call.write(total)),
                parts.size(0), each);
  });
  return total;
}

}  // namespace xattn
