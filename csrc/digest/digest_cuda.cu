// Digest-token attention on CUDA: checks, allocation, launches.
#include <algorithm>
#include <tuple>

#include "common/cuda_call.h"
#include "common/cuda_rows.h"
#include "digest_checks.h"
#include "digest_forward.cuh"
#include "digest_table.cuh"

namespace xattn {
namespace {

using digest_cuda::Args;
using digest_cuda::kRows;
using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One call: its tensors in a layout that the kernels read, and their arguments.
struct DigestCall {
  CudaCall cuda;
  DigestTensors in;
  Dtype dtype;
  Args args{};

  DigestCall(const DigestTensors& tensors, const DigestOptions& o)
      : cuda(tensors.qkv), in(tensors), dtype(dtype_of(tensors.qkv)) {
    check_digest(in, o);
    STD_TORCH_CHECK(in.qkv.size(2) <= INT32_MAX, "digest: more than 2^31 channels");
    args.batch = in.batch();
    args.tokens = static_cast<int>(in.tokens());
    args.digests = static_cast<int>(in.digests());
    args.heads = static_cast<int>(o.heads);
    args.head_dim = static_cast<int>(in.channels() / o.heads);
    args.grid_h = static_cast<int>(o.grid_h);
    args.grid_w = static_cast<int>(o.grid_w);
    args.prefix = static_cast<int>(o.prefix);
    args.scale = static_cast<float>(o.scale);
    args.vector = args.head_dim * static_cast<int64_t>(in.qkv.element_size()) % 16 == 0;
    read_inputs();
    args.dropout = make_dropout(cuda.read(in.seed), o.dropout_p);
  }

  // A tensor of tokens as the kernels read it.
  Tensor rows(const Tensor& t) const { return args.vector ? aligned_rows(t) : dense_last(t); }

  bool empty() const { return args.batch == 0; }
  int64_t patches() const { return int64_t{args.grid_h} * args.grid_w; }

  // kernel(layout, grid, shared bytes), which launches `blocks` blocks for each chunk of channels:
  // a fast layout for head dimensions up to 32 or 64, where it can serve and what it wants of
  // shared memory, bytes(layout), is there; else the general one.
  template <class Bytes, class Kernel>
  void launch(int64_t blocks, Bytes bytes, Kernel kernel) {
    for_storage(dtype, [&](auto value) {
      using T = decltype(value);
      const auto run = [&](auto layout) {
        using L = decltype(layout);
        args.chunks = static_cast<int>(ceil_div(args.head_dim, L::kWidth));
        const size_t shared = bytes(layout);
        if (L::kFast && (!args.vector || args.chunks > 1 || args.dropout.seed != nullptr ||
                         static_cast<int64_t>(shared) > cuda.shared_limit())) {
          return false;
        }
        kernel(layout, dim3(static_cast<unsigned>(blocks), args.chunks), shared);
        return true;
      };
      if (run(digest_cuda::Layout<T, 32, true>{})) return;
      if constexpr (kIsShort<T>) {  // tiles of float would leave one block to a multiprocessor
        if (run(digest_cuda::Layout<T, 64, true>{})) return;
      }
      run(digest_cuda::Layout<T, 64, false>{});
    });
  }

 private:
  void read_inputs() {
    in.qkv = rows(in.qkv);
    args.qkv = cuda.read(in.qkv);
    for (int i = 0; i < 2; ++i) args.qkv_stride[i] = in.qkv.stride(i);
    if (in.digest_kv.has_value()) {
      in.digest_kv = rows(*in.digest_kv);
      args.digest_kv = cuda.read(*in.digest_kv);
      for (int i = 0; i < 2; ++i) args.digest_stride[i] = in.digest_kv->stride(i);
    }
    in.bias_table = contiguous_or_null(in.bias_table);
    in.digest_bias = contiguous_or_null(in.digest_bias);
    args.bias_table = cuda.read(in.bias_table);
    args.digest_bias = args.digests > 0 ? cuda.read(in.digest_bias) : nullptr;
  }
};

template <class L, int kLeft>
size_t memory_bytes(const Args& a) {
  return digest_cuda::Memory<L, kLeft>::bytes(a.grid_h, a.grid_w, a.bias_table != nullptr);
}

std::tuple<Tensor, Tensor> digest_fwd(Tensor qkv, MaybeTensor digest_kv, MaybeTensor bias_table,
                                      MaybeTensor digest_bias, MaybeTensor seed, int64_t heads,
                                      int64_t grid_h, int64_t grid_w, int64_t prefix, double scale,
                                      double dropout_p) {
  DigestCall call({qkv, digest_kv, bias_table, digest_bias, seed},
                  {heads, grid_h, grid_w, prefix, scale, dropout_p});
  Args& a = call.args;
  Tensor out =
      call.cuda.empty({a.batch, a.tokens, int64_t{a.heads} * a.head_dim}, qkv.scalar_type());
  Tensor row_stats = call.cuda.empty({a.batch, a.heads, a.tokens, 2}, ScalarType::Float);
  if (call.empty()) return {out, row_stats};
  a.out = call.cuda.write(out);
  a.row_stats = static_cast<float*>(call.cuda.write(row_stats));
  call.launch(
      a.batch * a.heads * ceil_div(a.tokens, kRows),
      [&](auto layout) { return memory_bytes<decltype(layout), 1>(a); },
      [&](auto layout, dim3 grid, size_t shared) {
        call.cuda.launch(digest_cuda::digest_forward<decltype(layout)>, grid, digest_cuda::kThreads,
                         shared, a);
      });
  return {out, row_stats};
}

// The gradient of the relative table [heads, grid_h * grid_w].
Tensor table_gradient(DigestCall& call) {
  constexpr int64_t kParts = 64;  // at most: memory grows with the table alone
  Args& a = call.args;
  const int64_t tiles = ceil_div(a.tokens, kRows);
  a.query_groups = static_cast<int>(std::min(tiles, kParts));
  a.shares = static_cast<int>(std::clamp<int64_t>(kParts / a.query_groups, 1, a.batch));
  const int64_t count = int64_t{a.shares} * a.query_groups;
  Tensor parts = call.cuda.empty({count, a.heads, call.patches()}, ScalarType::Float);
  a.table_parts = static_cast<float*>(call.cuda.write(parts));
  call.launch(
      count * a.heads,
      [&](auto layout) {
        using L = digest_cuda::TableLayout<decltype(layout)>;
        return digest_cuda::TableMemory<L>::bytes(a.grid_h, a.grid_w);
      },
      [&](auto layout, dim3 grid, size_t shared) {
        using L = digest_cuda::TableLayout<decltype(layout)>;
        call.cuda.launch(digest_cuda::digest_backward_table<L>, dim3(grid.x), digest_cuda::kThreads,
                         shared, a);
      });
  return sum_parts(call.cuda, parts, call.in.qkv.scalar_type());
}

// dQ and delta, then dK and dV with the sums of the digests' bias.
void launch_backward(DigestCall& call) {
  Args& a = call.args;
  const auto bytes = [&](auto layout) { return memory_bytes<decltype(layout), 2>(a); };
  call.launch(a.batch * a.heads * ceil_div(a.tokens, kRows), bytes,
              [&](auto layout, dim3 grid, size_t shared) {
                call.cuda.launch(digest_cuda::digest_backward_rows<decltype(layout)>, grid,
                                 digest_cuda::kThreads, shared, a);
              });
  call.launch(a.batch * a.heads * (ceil_div(a.tokens, kRows) + ceil_div(a.digests, kRows)), bytes,
              [&](auto layout, dim3 grid, size_t shared) {
                call.cuda.launch(digest_cuda::digest_backward_columns<decltype(layout)>, grid,
                                 digest_cuda::kThreads, shared, a);
              });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> digest_bwd(
    Tensor grad_out, Tensor qkv, MaybeTensor digest_kv, MaybeTensor bias_table,
    MaybeTensor digest_bias, Tensor row_stats, MaybeTensor seed, int64_t heads, int64_t grid_h,
    int64_t grid_w, int64_t prefix, double scale, double dropout_p) {
  const DigestOptions options{heads, grid_h, grid_w, prefix, scale, dropout_p};
  DigestCall call({qkv, digest_kv, bias_table, digest_bias, seed}, options);
  check_digest_gradient(call.in, options, grad_out, row_stats);
  Args& a = call.args;
  const int64_t C = int64_t{a.heads} * a.head_dim;
  const ScalarType dtype = qkv.scalar_type();
  Tensor grad_qkv = call.cuda.empty({a.batch, a.tokens, 3 * C}, dtype);
  Tensor grad_digest_kv = digest_kv.has_value()
                              ? call.cuda.empty({a.batch, a.digests, 2 * C}, dtype)
                              : call.cuda.empty({0}, dtype);
  // None for None, zeros where there is nothing to sum.
  const auto zeros = [&](const MaybeTensor& like) {
    return like.has_value() ? torch::stable::new_zeros(*like, {like->size(0), like->size(1)})
                            : call.cuda.empty({0}, dtype);
  };
  if (call.empty()) return {grad_qkv, grad_digest_kv, zeros(bias_table), zeros(digest_bias)};

  grad_out = call.rows(grad_out);
  row_stats = torch::stable::contiguous(row_stats);
  Tensor deltas = call.cuda.empty({a.batch, a.heads, a.tokens}, ScalarType::Float);
  Tensor digest_parts = call.cuda.empty({a.batch, a.heads, a.digests}, ScalarType::Float);
  a.grad_out = call.cuda.read(grad_out);
  for (int i = 0; i < 2; ++i) a.grad_out_stride[i] = grad_out.stride(i);
  a.row_stats = static_cast<float*>(const_cast<void*>(call.cuda.read(row_stats)));
  a.grad_qkv = call.cuda.write(grad_qkv);
  a.grad_digest_kv = call.cuda.write(grad_digest_kv);
  a.deltas = static_cast<float*>(call.cuda.write(deltas));
  if (a.digest_bias != nullptr) {
    a.digest_parts = static_cast<float*>(call.cuda.write(digest_parts));
  }
  launch_backward(call);
  return {
      grad_qkv, grad_digest_kv, bias_table.has_value() ? table_gradient(call) : zeros(bias_table),
      a.digest_bias != nullptr ? sum_parts(call.cuda, digest_parts, dtype) : zeros(digest_bias)};
}

}  // namespace
}  // namespace xattn

XATTN_CUDA_OPS(m) {
  m.impl("digest_fwd", TORCH_BOX(&xattn::digest_fwd));
  m.impl("digest_bwd", TORCH_BOX(&xattn::digest_bwd));
}
