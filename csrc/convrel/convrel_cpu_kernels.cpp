// Factorised conv-relative attention on one core of the CPU, forward and backward, for one ISA.
//
// The unit of work is one group of heads of one image. K and V are read once for the D x D context
// of every head (an online column softmax), Q and V once more for the output: the context's product
// and the depthwise convolution of V, row by row, from a ring of padded rows. Lanes are channels;
// storage types are widened on their way into scratch.
#include "convrel_backward.h"
#include "convrel_forward.h"

namespace xattn::XATTN_ISA {

extern const ConvRelKernels convrel_kernels;
const ConvRelKernels convrel_kernels{
    pass_scratch<convrel::Forward, ConvRelArgs>, pass_scratch<convrel::Backward, ConvRelArgs>,
    run_pass<convrel::Forward, ConvRelArgs, int64_t, int64_t>,
    run_pass<convrel::Backward, ConvRelArgs, const ConvRelChunk*, int64_t>};

}  // namespace xattn::XATTN_ISA
