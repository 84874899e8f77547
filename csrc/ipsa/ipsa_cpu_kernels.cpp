// Inner-patch attention on one core of the CPU, forward and backward, for one ISA.
//
// The unit of work is one head of one window: n tokens of d channels, n = 49 and d = 32 in CAT.
// It is gathered into scratch that stays in the first-level cache; queries are then taken a tile of
// kRows at a time: scores (lanes = keys), softmax, weighted sum (lanes = channels). Logits are kept
// in powers of two (scale and bias are multiplied by log2 e), so that the softmax needs 2^x alone.
// A window of 16 k + 1 tokens would waste nearly a vector a row on its last key: that "tail" key is
// computed by dot products instead.
#include "ipsa_backward.h"
#include "ipsa_block.h"
#include "ipsa_forward.h"

namespace xattn::XATTN_ISA {
namespace {

// CAT's sizes are compiled in for the dtypes that models run in; any other size is a run-time
// value.
template <class S, class M, class F>
void with_unit(const IpsaArgs& a, F f) {
  constexpr bool kModelDtype = sizeof(S) == 4 || __is_same(S, bf16);
  if constexpr (kModelDtype) {
    if (a.tokens() == 49 && a.head_dim == 32) return f(Type<Unit<S, M, kRowsOf49, 49, 32>>{});
  }
  f(Type<Unit<S, M, kRowsOfAny, 0, 0>>{});
}

// Calls f(Type<Unit>) with the unit for the call's dtype and sizes.
template <class F>
void dispatch(const IpsaArgs& a, F f) {
  with_policy(a.dtype, [&](auto storage, auto policy) {
    with_unit<typename decltype(storage)::type, typename decltype(policy)::type>(a, f);
  });
}

int64_t forward_scratch(const IpsaArgs& a) {
  int64_t bytes = 0;
  dispatch(a, [&](auto type) { bytes = Forward<typename decltype(type)::type>::scratch(a); });
  return bytes;
}
void forward(const IpsaArgs& a, int64_t begin, int64_t end, void* scratch) {
  dispatch(
      a, [&](auto type) { forward_units<typename decltype(type)::type>(a, begin, end, scratch); });
}

int64_t backward_scratch(const IpsaArgs& a, int64_t chunk_heads) {
  int64_t bytes = 0;
  dispatch(a, [&](auto type) {
    bytes = Backward<typename decltype(type)::type>::scratch(a, chunk_heads);
  });
  return bytes;
}
void backward(const IpsaArgs& a, const IpsaChunk& chunk, void* scratch) {
  dispatch(a, [&](auto type) { backward_chunk<typename decltype(type)::type>(a, chunk, scratch); });
}

// Of float32 alone.
template <class F>
void dispatch_block(const IpsaBlockArgs& block, F f) {
  dispatch(block.map, [&](auto type) {
    if constexpr (__is_same(typename decltype(type)::type::Storage, float)) f(type);
  });
}

int64_t whole_block_scratch(const IpsaBlockArgs& block) {
  int64_t bytes = 0;
  dispatch_block(block,
                 [&](auto type) { bytes = block_scratch<typename decltype(type)::type>(block); });
  return bytes;
}
void whole_block(const IpsaBlockArgs& block, int64_t begin, int64_t end, void* scratch) {
  dispatch_block(block, [&](auto type) {
    block_windows<typename decltype(type)::type>(block, begin, end, scratch);
  });
}
int64_t packed_size(int64_t out_features, int64_t in_features) {
  return round_up(out_features, Lanes<float>::n) * in_features;
}

}  // namespace

extern const IpsaKernels ipsa_kernels;
const IpsaKernels ipsa_kernels{forward_scratch, backward_scratch,    forward,
                               backward,        whole_block_scratch, whole_block,
                               packed_size,     pack_weight<float>};

}  // namespace xattn::XATTN_ISA
