// CLS-query cross attention on one core of the CPU, forward and backward, for one ISA.
//
// Two kinds of work: small products over the whole batch, a head at a time (q, u, W_v, and the
// gradients of the weights), and one pass over the tokens of each image, block by block through
// scratch: the norm, the logits of all heads, the softmax, the weighted sum. Lanes are channels;
// storage types are widened on their way into registers.
#include "clsattn_backward.h"
#include "clsattn_forward.h"

namespace xattn::XATTN_ISA {
namespace clsattn {
namespace {

using Stage = ClsAttnStage;

int64_t workspace(const ClsAttnArgs& a) {
  int64_t bytes = 0;
  with_storage(a.dtype, [&](auto type) { bytes = Call<typename decltype(type)::type>(a).bytes; });
  return bytes;
}

int64_t scratch(const ClsAttnArgs& a, Stage stage) {
  int64_t bytes = 0;
  with_storage(a.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    const Call<S> call(a);
    bytes = stage < Stage::kForward ? Forward<S>(call, nullptr).bytes
                                    : Backward<S>(call, nullptr).bytes;
  });
  return bytes;
}

int64_t items(const ClsAttnArgs& a, Stage stage) {
  const int64_t lanes = a.dtype == Dtype::kFloat64 ? Lanes<double>::n : Lanes<float>::n;
  switch (stage) {
    case Stage::kQuery:
    case Stage::kOutput:
    case Stage::kGradPooled:
    case Stage::kGradHeads:
      return a.heads;
    case Stage::kPool:
    case Stage::kGradWeights:
      return a.batch * a.parts;
    case Stage::kJoin:  // a single part goes on to it at once, and to kGradPatches
      return a.parts == 1 ? 0 : a.batch;
    case Stage::kGradPatches:
      return a.parts == 1 ? 0 : a.batch * a.parts;
    case Stage::kGradQuery:
      return (a.channels() + kChunk - 1) / kChunk;
    case Stage::kGradNorm:
      return a.batch + (a.norm_weight ? (a.channels() + lanes - 1) / lanes : 0);
    default:
      return a.batch;
  }
}

template <class S>
void run_item(const Forward<S>& f, Stage stage, int64_t item) {
  switch (stage) {
    case Stage::kToken:
      return f.token(item);
    case Stage::kQuery:
      return f.query(item);
    case Stage::kPool:
      return f.pool(item);
    case Stage::kJoin:
      return f.join(item);
    default:
      return f.output(item);
  }
}

template <class S>
void run_item(const Backward<S>& f, Stage stage, int64_t item) {
  switch (stage) {
    case Stage::kGradToken:
      return f.token(item);
    case Stage::kGradPooled:
      return f.pooled(item);
    case Stage::kGradWeights:
      return f.weights(item);
    case Stage::kGradPatches:
      return f.patches(item);
    case Stage::kGradJoin:
      return f.join(item);
    case Stage::kGradHeads:
      return f.head(item);
    case Stage::kGradQuery:
      return f.query(item);
    default:
      return f.norm(item);
  }
}

void run(const ClsAttnArgs& a, Stage stage, int64_t begin, int64_t end, void* memory) {
  with_storage(a.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    const Call<S> call(a);
    if (stage < Stage::kForward) {
      const Forward<S> forward(call, memory);
      for (int64_t i = begin; i < end; ++i) run_item(forward, stage, i);
    } else {
      const Backward<S> backward(call, memory);
      for (int64_t i = begin; i < end; ++i) run_item(backward, stage, i);
    }
  });
}

}  // namespace
}  // namespace clsattn

extern const ClsAttnKernels clsattn_kernels;
const ClsAttnKernels clsattn_kernels{clsattn::workspace, clsattn::scratch, clsattn::items,
                                     clsattn::run};

}  // namespace xattn::XATTN_ISA
