// Which build of the CPU kernels runs: chosen once, when the library is loaded.
#pragma once

#include "dtype.h"

namespace xattn {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The best ISA of this CPU among those built, or the lower one that XATTN_ISA names.
Isa active_isa();
const char* isa_name(Isa isa);

// The kernel table of the active ISA for a dtype. `Table` is an operator's struct of function
// pointers, of which each ISA's translation unit defines one instance. AVX-512 with bfloat16 is
// built for bfloat16 alone; the other dtypes would be what AVX-512 has.
#if defined(XATTN_X86)
#define XATTN_SELECT_KERNELS(Table, name)                        \
  namespace generic {                                            \
  extern const Table name;                                       \
  }                                                              \
  namespace avx2 {                                               \
  extern const Table name;                                       \
  }                                                              \
  namespace avx512 {                                             \
  extern const Table name;                                       \
  }                                                              \
  namespace avx512_bf16 {                                        \
  extern const Table name;                                       \
  }                                                              \
  static const Table& select_##name(Dtype dtype) {               \
    switch (active_isa()) {                                      \
      case Isa::kAvx512Bf16:                                     \
        if (dtype == Dtype::kBFloat16) return avx512_bf16::name; \
        return avx512::name;                                     \
      case Isa::kAvx512:                                         \
        return avx512::name;                                     \
      case Isa::kAvx2:                                           \
        return avx2::name;                                       \
      default:                                                   \
        return generic::name;                                    \
    }                                                            \
  }
#else
#define XATTN_SELECT_KERNELS(Table, name) \
  namespace generic {                     \
  extern const Table name;                \
  }                                       \
  static const Table& select_##name(Dtype) { return generic::name; }
#endif

}  // namespace xattn
