// Factorised conv-relative attention on one core of the CPU, forward and backward, for one ISA.
//
// The unit of work is one group of heads of one image. K and V are read once for the D x D context
// of every head (an online column softmax), Q and V once more for the output: the context's product
// and the depthwise convolution of V, row by row, from a ring of padded rows. Lanes are channels;
// storage types are widened on their way into scratch.
#include "convrel_backward.h"
#include "convrel_forward.h"

namespace xattn::XATTN_ISA {
namespace {

int64_t forward_scratch(const ConvRelArgs& a) {
  int64_t bytes = 0;
  with_storage(a.dtype, [&](auto type) {
    bytes = Forward<typename decltype(type)::type>(a, nullptr).bytes;
  });
  return bytes;
}
int64_t backward_scratch(const ConvRelArgs& a) {
  int64_t bytes = 0;
  with_storage(a.dtype, [&](auto type) {
    bytes = Backward<typename decltype(type)::type>(a, nullptr).bytes;
  });
  return bytes;
}
void forward(const ConvRelArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_storage(a.dtype, [&](auto type) {
    Forward<typename decltype(type)::type>(a, scratch).run(begin, end);
  });
}
void backward(const ConvRelArgs& a, const ConvRelChunk* chunks, int64_t count, void* scratch) {
  with_storage(a.dtype, [&](auto type) {
    Backward<typename decltype(type)::type>(a, scratch).run(chunks, count);
  });
}

}  // namespace

extern const ConvRelKernels convrel_kernels;
const ConvRelKernels convrel_kernels{forward_scratch, backward_scratch, forward, backward};

}  // namespace xattn::XATTN_ISA
