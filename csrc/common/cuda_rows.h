// Tensors of tokens as CUDA kernels like to read them.
#pragma once

#include "tensors.h"

namespace xattn {

// [B, N, channels] whose rows begin at multiples of 16 bytes: the tensor itself or a dense copy.
// The channels of a row are a multiple of 16 bytes.
inline Tensor aligned_rows(const Tensor& t) {
  const auto size = static_cast<int64_t>(t.element_size());
  const bool fits = t.stride(2) == 1 && t.stride(0) * size % 16 == 0 &&
                    t.stride(1) * size % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  if (fits) return t;
  const Tensor dense = torch::stable::contiguous(t);  // a dense one may lie at an odd address
  return dense.const_data_ptr() == t.const_data_ptr() ? torch::stable::clone(t) : dense;
}

}  // namespace xattn
