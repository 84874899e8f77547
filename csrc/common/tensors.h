// What the host files of the operators share: tensors in, plain pointers out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

#include "checks.h"

namespace xattn {

// The tensor itself where its last dimension is dense, else a contiguous copy.
inline Tensor dense_last(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// Asks for huge pages under large fresh memory: touching it first in small ones costs more than all
// the arithmetic of a large map (0.3 ms a MB against 0.03). A hint, where the system takes any;
// XATTN_HUGE_PAGES=0 leaves it out.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHuge = int64_t{2} << 20;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  static const bool wanted = [] {
    const char* value = std::getenv("XATTN_HUGE_PAGES");
    return value == nullptr || value[0] != '0';
  }();
  if (!wanted || bytes < kHuge) return;
  const auto address = reinterpret_cast<uintptr_t>(data), begin = address / page * page;
  madvise(reinterpret_cast<void*>(begin), address + static_cast<uintptr_t>(bytes) - begin,
          MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor of `like`'s device, and of its dtype unless one is given.
inline Tensor empty_for(const Tensor& like, std::vector<int64_t> sizes,
                        std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  advise_huge_pages(t.mutable_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
}

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

inline std::optional<Tensor> contiguous_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

// Partial sums [parts, ...] of a compute type as one tensor [...] of `like`'s dtype: added in
// double and in the order of the parts, which never depends on the number of threads.
inline Tensor sum_parts(Tensor parts, const Tensor& like) {
  const int64_t count = parts.size(0), each = count > 0 ? parts.numel() / count : 0;
  const auto add = [&](auto* data) {
    constexpr int64_t kBlock = 64;
    for (int64_t first = 0; first < each; first += kBlock) {
      const int64_t size = each - first < kBlock ? each - first : kBlock;
      double sums[kBlock] = {};
      for (int64_t part = 0; part < count; ++part) {
        for (int64_t i = 0; i < size; ++i) sums[i] += data[part * each + first + i];
      }
      for (int64_t i = 0; i < size; ++i) data[first + i] = sums[i];
    }
  };
  if (parts.scalar_type() == torch::headeronly::ScalarType::Double) {
    add(parts.mutable_data_ptr<double>());
  } else {
    add(parts.mutable_data_ptr<float>());
  }
  return torch::stable::to(torch::stable::select(parts, 0, 0), like.scalar_type());
}

// The seed of a dropout mask, checked, as the two words of a Philox key.
inline void read_seed(const std::optional<Tensor>& seed, uint32_t (&key)[2]) {
  const auto value = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  key[0] = static_cast<uint32_t>(value);
  key[1] = static_cast<uint32_t>(value >> 32);
}

// Aligned memory of one thread for one call, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "xattn_ops: out of memory, ", bytes, " bytes of scratch");
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

}  // namespace xattn
