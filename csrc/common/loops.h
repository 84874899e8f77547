// Loops whose step is a compile-time constant: what cuts a matrix into register tiles.
#pragma once

#include "dtype.h"
#include "simd_exp2.h"
#include "simd_lanes.h"

namespace xattn::XATTN_ISA {

template <int N>
struct Int {
  static constexpr int value = N;
  constexpr operator int64_t() const { return N; }
};

template <class T>
XATTN_INLINE void exchange(T& a, T& b) {
  const T previous = a;
  a = b;
  b = previous;
}

// Calls f(Int<size>): a size known at run time becomes a constant, 1 <= size <= kMax.
template <int kMax, class F>
XATTN_INLINE void with_constant(int64_t size, F f) {
  if constexpr (kMax == 1) {
    f(Int<1>{});
  } else if (size == kMax) {
    f(Int<kMax>{});
  } else {
    with_constant<kMax - 1>(size, f);
  }
}

// Calls f(first, size) for groups of nearly equal size, `most` at the most: 49 by 6 are 4 groups of
// 6 and 5 of 5, not 8 of 6 and a slow one of 1.
template <class F>
XATTN_INLINE void for_groups(int64_t count, int64_t most, F f) {
  const int64_t groups = (count + most - 1) / most;
  for (int64_t g = 0, first = 0; g < groups; ++g) {
    const int64_t size = count / groups + (g < count % groups);
    f(first, size);
    first += size;
  }
}

// Calls f(Int<C>, first) for such groups of columns, multiples of kStep up to kMax.
template <int kMax, int kStep, class F>
XATTN_INLINE void for_columns(int64_t count, F f) {
  for_groups((count + kStep - 1) / kStep, kMax / kStep,
             [&](int64_t first, int64_t size) XATTN_LAMBDA_INLINE {
               with_constant<kMax / kStep>(size, [&](auto n) XATTN_LAMBDA_INLINE {
                 f(Int<decltype(n)::value * kStep>{}, first * kStep);
               });
             });
}

// Calls f(Int<size>, first) for groups of kMax and what is left, for counts known to be small: an
// uneven end costs less than the divisions of even groups.
template <int kMax, class F>
XATTN_INLINE void for_blocks(int64_t count, F f) {
  int64_t first = 0;
  for (; first + kMax <= count; first += kMax) f(Int<kMax>{}, first);
  if constexpr (kMax > 1) {
    if (first < count) {
      with_constant<kMax - 1>(count - first, [&](auto n) XATTN_LAMBDA_INLINE { f(n, first); });
    }
  }
}

// Calls f(Int<R>, first) for groups of kMax rows, then of 2 and of 1.
template <int kMax, class F>
XATTN_INLINE void for_rows(int64_t count, F f) {
  int64_t first = 0;
  for (; first + kMax <= count; first += kMax) f(Int<kMax>{}, first);
  if constexpr (kMax > 2) {
    for (; first + 2 <= count; first += 2) f(Int<2>{}, first);
  }
  if constexpr (kMax > 1) {
    for (; first < count; ++first) f(Int<1>{}, first);
  }
}

// A type as a value, for lambdas that take it as their argument.
template <class T>
struct Type {
  using type = T;
};

// f(Type<storage type>) of a dtype.
template <class F>
void with_storage(Dtype dtype, F f) {
#if defined(__AVX512BF16__)
  f(Type<bf16>{});  // the only dtype that this ISA is built for, see isa.h
#else
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Type<float>{});
    case Dtype::kFloat64:
      return f(Type<double>{});
    case Dtype::kBFloat16:
      return f(Type<bf16>{});
    case Dtype::kFloat16:
      return f(Type<f16>{});
  }
#endif
}

// Bytes of scratch that Pass<storage type>(args, no memory) counts, and its run(rest...) in them.
template <template <class> class Pass, class Args>
int64_t pass_scratch(const Args& args) {
  int64_t bytes = 0;
  with_storage(args.dtype, [&](auto type) {
    bytes = Pass<typename decltype(type)::type>(args, nullptr).bytes;
  });
  return bytes;
}
template <template <class> class Pass, class Args, class... Rest>
void run_pass(const Args& args, Rest... rest, void* scratch) {
  with_storage(args.dtype,
               [&](auto type) { Pass<typename decltype(type)::type>(args, scratch).run(rest...); });
}

}  // namespace xattn::XATTN_ISA
