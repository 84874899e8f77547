// Digest-token attention on one core of the CPU, forward and backward, for one ISA.
//
// The unit of work is one head of one image: N queries against N + M keys. Its keys are packed once
// (lanes = keys for the logits, lanes = channels for the products with V); queries are taken in
// blocks of a few tiles, whose logits against all keys stay in cache. Up to 512 keys a row of
// logits is whole and its maximum exact; beyond, chunks of keys are joined by an online softmax.
// Logits are kept in powers of two (scale and bias are multiplied by log2 e), so the softmax needs
// 2^x alone.
#include "digest_backward.h"
#include "digest_forward.h"

namespace xattn::XATTN_ISA {
namespace digest {
namespace {

// CabViT's head size is compiled in for the dtypes that models run in; any other is a run-time
// value.
template <class S, class M, class F>
void with_unit(const DigestArgs& a, F f) {
  constexpr bool kModelDtype = sizeof(S) == 4 || __is_same(S, bf16);
  if constexpr (kModelDtype) {
    if (a.head_dim == 32) return f(Type<Unit<S, M, 32>>{});
  }
  f(Type<Unit<S, M, 0>>{});
}

// Calls f(Type<Unit>) with the unit for the call's dtype and sizes.
template <class F>
void dispatch(const DigestArgs& a, F f) {
  with_policy(a.dtype, [&](auto storage, auto policy) {
    with_unit<typename decltype(storage)::type, typename decltype(policy)::type>(a, f);
  });
}

int64_t forward_scratch(const DigestArgs& a) {
  int64_t bytes = 0;
  dispatch(a, [&](auto type) { bytes = Forward<typename decltype(type)::type>::scratch(a); });
  return bytes;
}
int64_t forward_item_count(const DigestArgs& a) {
  int64_t count = 0;
  dispatch(a, [&](auto type) {
    using U = typename decltype(type)::type;
    count = a.units() * Forward<U>::blocks(U{a});
  });
  return count;
}
void forward(const DigestArgs& a, int64_t begin, int64_t end, void* scratch) {
  dispatch(
      a, [&](auto type) { forward_items<typename decltype(type)::type>(a, begin, end, scratch); });
}

int64_t backward_scratch(const DigestArgs& a) {
  int64_t bytes = 0;
  dispatch(a, [&](auto type) { bytes = Backward<typename decltype(type)::type>::scratch(a); });
  return bytes;
}
void backward(const DigestArgs& a, int64_t begin, int64_t end, void* scratch) {
  dispatch(
      a, [&](auto type) { backward_items<typename decltype(type)::type>(a, begin, end, scratch); });
}
int64_t key_part_size(const DigestArgs& a) {
  int64_t size = 0;
  dispatch(a, [&](auto type) {
    using U = typename decltype(type)::type;
    size = Backward<U>::key_part_size(U{a});
  });
  return size;
}
void sum_key_parts(const DigestArgs& a, int64_t begin, int64_t end, void* scratch) {
  auto* index = (uint32_t*)scratch;
  order_keys(a, index);
  dispatch(a, [&](auto type) {
    using U = typename decltype(type)::type;
    const U u{a};
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto* parts =
          (const typename U::T*)a.key_parts + unit * a.splits * Backward<U>::key_part_size(u);
      write_key_gradients(u, index, unit % a.batch, unit / a.batch, parts, a.splits);
    }
  });
}

}  // namespace
}  // namespace digest

extern const DigestKernels digest_kernels;
const DigestKernels digest_kernels{
    digest::forward_scratch, digest::backward_scratch, digest::forward_item_count, digest::forward,
    digest::backward,        digest::key_part_size,    digest::sum_key_parts};

}  // namespace xattn::XATTN_ISA
