// Token merge and enhancement on the CPU: checks, allocation, threads. The arithmetic is in
// merge_cpu_kernels.cpp.
#include "merge.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tensors.h"
#include "common/weight_gradients.h"
#include "merge_checks.h"

namespace xattn {

XATTN_SELECT_KERNELS(MergeKernels, merge_kernels)

namespace {

using MaybeTensor = std::optional<Tensor>;

// A call's tensors and per-channel tables, held as long as the kernels read them.
struct MergeCall {
  Tensor x, enhance;
  MaybeTensor merge, bias;
  DepthwiseTable merge_table, enhance_table;
  MergeArgs args{};

  MergeCall(const Tensor& x_in, const MaybeTensor& merge_in, const Tensor& enhance_in,
            const MaybeTensor& bias_in, const MergeOptions& o) {
    check_merge(o, x_in, merge_in, enhance_in, bias_in);
    x = dense_last(x_in);
    enhance = torch::stable::contiguous(enhance_in);
    merge = contiguous_or_null(merge_in);
    bias = contiguous_or_null(bias_in);
    set_sizes(o);
    enhance_table.add(args.channels, enhance.size(2));
    args.enhance = enhance_table.weights(enhance, bias);
    if (merge.has_value()) {
      merge_table.add(args.channels, merge->size(2));
      args.merge = merge_table.weights(*merge, std::nullopt);
    }
  }

  // [batch, merged tokens, channels], of no tokens without a merge.
  std::vector<int64_t> digest_sizes() const {
    const int64_t tokens = merge.has_value() ? args.merged_height() * args.merged_width() : 0;
    return {args.batch, tokens, args.channels};
  }
  std::vector<int64_t> token_sizes() const { return {args.batch, args.tokens(), args.channels}; }

 private:
  void set_sizes(const MergeOptions& o) {
    args.dtype = dtype_of(x);
    args.batch = x.size(0);
    args.prefix = o.prefix;
    args.height = o.height;
    args.width = o.width;
    args.channels = x.size(2);
    args.stride = o.largest_stride();
    args.x = x.const_data_ptr();
    for (int i = 0; i < 2; ++i) args.x_stride[i] = x.stride(i);
    // A cache line of every token, and rows cut apart where images and groups are few.
    constexpr int64_t kLine = 64, kUnits = 64, kRowsPerBand = 8;
    args.group_channels = std::min(args.channels, kLine / int64_t(x.element_size()));
    const int64_t units = std::max<int64_t>(1, args.batch * args.groups());
    args.bands =
        std::clamp<int64_t>(kUnits / units, 1, std::max<int64_t>(1, args.height / kRowsPerBand));
  }
};

// A gradient of an output of these sizes as pointer and strides; null where there is none.
const void* read_gradient(const Tensor& x, MaybeTensor& grad, const std::vector<int64_t>& sizes,
                          int64_t (&stride)[2]) {
  check_merge_gradient(x, grad, sizes);
  if (!grad.has_value()) return nullptr;
  grad = dense_last(*grad);
  for (int i = 0; i < 2; ++i) stride[i] = grad->stride(i);
  return grad->const_data_ptr();
}

std::tuple<Tensor, Tensor> merge_fwd(Tensor x, MaybeTensor merge_weight, Tensor enhance_weight,
                                     MaybeTensor enhance_bias, int64_t grid_h, int64_t grid_w,
                                     int64_t stride, int64_t prefix) {
  MergeCall call(x, merge_weight, enhance_weight, enhance_bias, {grid_h, grid_w, stride, prefix});
  MergeArgs& a = call.args;
  Tensor digests = empty_for(call.x, call.digest_sizes());
  Tensor enhanced = empty_for(call.x, call.token_sizes());
  a.digests = digests.mutable_data_ptr();
  a.out = enhanced.mutable_data_ptr();
  const MergeKernels& kernels = select_merge_kernels(a.dtype);
  const int64_t bytes = kernels.forward_scratch(a);
  const int64_t units = a.batch * a.groups() * a.bands;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernels.forward(a, begin, end, scratch.get());
  });
  return {digests, enhanced};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_bwd(
    MaybeTensor grad_digests, MaybeTensor grad_enhanced, Tensor x, MaybeTensor merge_weight,
    Tensor enhance_weight, MaybeTensor enhance_bias, int64_t grid_h, int64_t grid_w, int64_t stride,
    int64_t prefix) {
  MergeCall call(x, merge_weight, enhance_weight, enhance_bias, {grid_h, grid_w, stride, prefix});
  MergeArgs& a = call.args;
  a.grad_digests = read_gradient(x, grad_digests, call.digest_sizes(), a.grad_digests_stride);
  if (!call.merge.has_value()) a.grad_digests = nullptr;  // of an empty output
  a.grad_enhanced = read_gradient(x, grad_enhanced, call.token_sizes(), a.grad_enhanced_stride);
  Tensor grad_x = empty_for(call.x, call.token_sizes());
  a.out = grad_x.mutable_data_ptr();

  const MergeKernels& kernels = select_merge_kernels(a.dtype);
  const int64_t bytes = kernels.backward_scratch(a);
  WeightGradients gradients(call.x, a.batch, a.groups(),
                            {call.merge.has_value() ? call.merge->numel() : 0, call.enhance.numel(),
                             call.bias.has_value() ? a.channels : 0});
  gradients.for_chunks<MergeChunk>(a.batch, a.groups(), bytes,
                                   [&](const MergeChunk* chunks, int64_t count, void* scratch) {
                                     kernels.backward(a, chunks, count, scratch);
                                   });
  const auto as_weight = [&](size_t i, const Tensor& weight) {
    const int64_t window = weight.size(2);
    return torch::stable::view(gradients.sum(i), {a.channels, 1, window, window});
  };
  return {grad_x, call.merge.has_value() ? as_weight(0, *call.merge) : gradients.sum(0),
          as_weight(1, call.enhance), gradients.sum(2)};
}

}  // namespace
}  // namespace xattn

STABLE_TORCH_LIBRARY_IMPL(xattn_ops, CPU, m) {
  m.impl("merge_fwd", TORCH_BOX(&xattn::merge_fwd));
  m.impl("merge_bwd", TORCH_BOX(&xattn::merge_bwd));
}
