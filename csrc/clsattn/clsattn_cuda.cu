// CLS-query cross attention on the GPU: launches. The arithmetic is in clsattn_forward.cuh,
// clsattn_backward.cuh and clsattn_backward_tokens.cuh; sizes that these do not take, odd channels
// or many heads, go through clsattn_general.cuh.
#include <tuple>

#include "clsattn_cuda.h"
#include "clsattn_backward_tokens.cuh"
#include "clsattn_general.cuh"
#include "common/small_matmul.cuh"

namespace xattn {
namespace {

using namespace clsattn_cuda;

// ---------------------------------------------------------------------- the fused kernels

template <int kTilesOf, int kGroupsOf>
struct Shape {
  static constexpr int kTiles = kTilesOf, kGroups = kGroupsOf;
  static constexpr int kMostChannels = kTiles * kWarps * 16, kMostHeads = kGroups * 8;
};

// f(Shape), the first that holds the channels and heads; whether there is one.
template <class T, class F>
bool with_shape(const Inputs<T>& in, F&& f) {
  const auto try_shape = [&](auto shape) {
    using S = decltype(shape);
    return in.channels % kStep == 0 && in.channels <= S::kMostChannels &&
           in.heads <= S::kMostHeads && f(shape);
  };
  return try_shape(Shape<6, 1>{}) || try_shape(Shape<12, 1>{}) || try_shape(Shape<12, 2>{});
}

// How many tiles of tokens a block holds: two, one being loaded, unless with one more blocks share
// a multiprocessor; 0 where not even one fits.
template <class Memory>
int choose_stages(int channels, int64_t limit) {
  const int64_t one = Memory(channels, 1, nullptr).bytes, two = Memory(channels, 2, nullptr).bytes;
  if (one > limit) return 0;
  return 2 * two <= limit || (two <= limit && 2 * one > limit) ? 2 : 1;
}

// Launches a kernel of one block for each part of an image; false where its memory does not fit.
template <class Memory, class T, class Kernel, class Args>
bool launch_parts(CudaCall& call, const Inputs<T>& in, Kernel kernel, const Args& args) {
  const int stages = choose_stages<Memory>(in.channels, call.shared_limit());
  if (stages == 0) return false;
  const auto bytes = static_cast<size_t>(Memory(in.channels, stages, nullptr).bytes);
  const dim3 grid(static_cast<unsigned>(in.batch * in.parts));
  call.launch(kernel, grid, kThreads, bytes, args, stages);
  return true;
}

dim3 grid_of_warps(int64_t rows) {
  return dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
}
template <class T>
dim3 grid_of_channels(const Inputs<T>& in, int64_t rows) {
  return dim3(static_cast<unsigned>((in.channels + kThreads - 1) / kThreads * rows));
}

// ---------------------------------------------------------------------- small products

// Operands of the products of heads: entries of a batch are heads, rows are images.
template <class T>
struct Operands {
  const Inputs<T>& in;
  int64_t C = in.channels, D = in.head_dim, H = in.heads, state = D + 2 * C;

  // [images, C] of a head, of [batch, heads, C].
  MatmulOperand of_head(const void* x, bool wide = false) const { return {x, C, H * C, 1, wide}; }
  // [images, D] of a head, of [batch, C].
  MatmulOperand slice(const void* x, int64_t stride, bool wide = false) const {
    return {x, D, stride, 1, wide};
  }
  MatmulOperand query() const { return {in.head_state, state, H * state, 1, true}; }
  MatmulOperand weight(const void* w) const { return {w, D * C, C, 1, false}; }  // [D, C] of a head
  static MatmulOperand transposed(MatmulOperand x) {
    std::swap(x.row_stride, x.column_stride);
    return x;
  }
};

// [C, C] or [images, C] as they are.
MatmulOperand whole(const void* x, int64_t stride, bool wide = false) {
  return {x, 0, stride, 1, wide};
}

// ---------------------------------------------------------------------- forward

template <class T>
void pool_general(CudaCall& call, Workspace& workspace, Forward<T>& f) {
  f.parts = 1;
  const int64_t B = f.batch, H = f.heads, C = f.channels, tokens = f.tokens;
  T* hat = workspace.take<T>({B, tokens, C});
  float* logits = workspace.take<float>({B, H, tokens});
  const Inputs<T>& in = f;
  call.launch(normalise_tokens<T>, grid_of_warps(B * tokens), kThreads, 0, in, hat, false);
  SmallMatmul p{B, f.heads, f.tokens, f.channels};
  p.a = {f.keys, H * C, C, 1, false};
  p.b = {hat, tokens * C, 1, C, false};
  p.c = {logits, H * tokens, tokens, true};
  p.alpha = f.scale * kLog2e;
  multiply_small<T>(call, {p});
  call.launch(weigh_rows<T>, dim3(static_cast<unsigned>(B * H)), kThreads, 0, f, logits);
  p = {B, f.heads, f.channels, f.tokens};
  p.a = {logits, H * tokens, tokens, 1, true};
  p.b = {hat, tokens * C, C, 1, false};
  p.c = {f.part_sums, H * C, C, true};
  multiply_small<T>(call, {p});
}

template <class T>
void run_forward(CudaCall& call, const Tensors& t, Inputs<T> in, Tensor& out) {
  const int64_t B = in.batch, H = in.heads, C = in.channels, D = in.head_dim;
  Workspace workspace(call, t.cls.scalar_type());
  Forward<T> f{in};
  f.keys = workspace.take<T>({B, H, C});
  f.key_sums = workspace.take<float>({B, H});
  f.part_sums = workspace.take<float>({B, in.parts, H, C});
  f.part_stats = workspace.take<float>({B, in.parts, H, kStats});
  f.pooled = workspace.take<T>({B, H, C});
  f.shares = workspace.take<float>({B, H});
  MatmulOperand cls = whole(in.cls, in.cls_stride);
  if (in.norm_weight) {
    f.normed = workspace.take<T>({B, C});
    call.launch(norm_cls<T>, grid_of_warps(B), kThreads, 0, in, f.normed, true);
    cls = whole(f.normed, C);
  }

  const Operands<T> op{in};
  SmallMatmul p{H, static_cast<int>(B), in.head_dim, in.channels};  // q
  p.a = cls;
  p.b = op.transposed(op.weight(call.read(t.q_weight)));
  p.c = {in.head_state, op.state, H * op.state, true};
  p.bias = {call.read(t.q_bias), D};
  multiply_small<T>(call, {p});
  p = {H, static_cast<int>(B), in.channels, in.head_dim};  // u
  p.a = op.query();
  p.b = op.weight(call.read(t.k_weight));
  p.c = {in.head_state + D, op.state, H * op.state, true};
  multiply_small<T>(call, {p});
  call.launch(fold_keys<T>, grid_of_warps(B * H), kThreads, 0, f);

  const bool fused = with_shape(in, [&](auto shape) {
    using S = decltype(shape);
    return launch_parts<PoolMemory<T, S::kGroups>>(call, in, pool<T, S::kTiles, S::kGroups>, f);
  });
  if (!fused) pool_general(call, workspace, f);
  call.launch(join_parts<T>, grid_of_channels(in, B * H), kThreads, 0, f);

  p = {H, static_cast<int>(B), in.head_dim, in.channels};  // out
  p.a = op.of_head(f.pooled);
  p.b = op.transposed(op.weight(call.read(t.v_weight)));
  p.c = {call.write(out), D, C, false};
  p.bias = {call.read(t.v_bias), D, in.dropout.seed ? f.shares : nullptr, 1, H};
  multiply_small<T>(call, {p});
}

// ---------------------------------------------------------------------- backward

template <class T>
void spread_general(CudaCall& call, Workspace& workspace, Backward<T>& g) {
  g.parts = 1;
  const int64_t B = g.batch, H = g.heads, C = g.channels, tokens = g.tokens;
  T* hat = workspace.take<T>({B, tokens, C});
  float* products = workspace.take<float>({B, 2 * H, tokens});
  float* dt = workspace.take<float>({B, tokens, C});
  const Inputs<T>& in = g;
  call.launch(normalise_tokens<T>, grid_of_warps(B * tokens), kThreads, 0, in, hat, true);
  SmallMatmul p{B, 2 * g.heads, g.tokens, g.channels};
  p.a = {g.rows, 2 * H * C, C, 1, false};
  p.b = {hat, tokens * C, 1, C, false};
  p.c = {products, 2 * H * tokens, tokens, true};
  multiply_small<T>(call, {p});
  call.launch(weigh_grad_rows<T>, dim3(static_cast<unsigned>(B * H)), kThreads, 0, g, products);
  p = {B, g.tokens, g.channels, 2 * g.heads};
  p.a = {products, 2 * H * tokens, 1, tokens, true};
  p.b = {g.rows, 2 * H * C, C, 1, false};
  p.c = {dt, tokens * C, C, true};
  multiply_small<T>(call, {p});
  p = {B, g.heads, g.channels, g.tokens};
  p.a = {products + H * tokens, 2 * H * tokens, tokens, 1, true};
  p.b = {hat, tokens * C, C, 1, false};
  p.c = {g.part_sums, H * C, C, true};
  multiply_small<T>(call, {p});
  call.launch(norm_backward<T>, grid_of_warps(B * tokens), kThreads, 0, g, hat, dt);
}

struct Gradients {
  Tensor cls, patches, q_weight, k_weight, v_weight;
};
// Partial sums [batch, C] of the gradients of vectors.
struct VectorGradients {
  Tensor q_bias, v_bias, norm_weight, norm_bias;
};

// dq [batch, C], then with it the gradients of the weights, and of n(CLS) by way of the query.
template <class T>
void weight_gradients(CudaCall& call, const Tensors& t, const Backward<T>& g, float* dq,
                      float* by_query, Gradients& grads) {
  const int64_t C = g.channels, D = g.head_dim;
  const int images = static_cast<int>(g.batch), channels = g.channels, dim = g.head_dim;
  const Operands<T> op{g};
  SmallMatmul query{g.heads, images, dim, channels};
  query.a = op.of_head(g.du);
  query.b = op.transposed(op.weight(call.read(t.k_weight)));
  query.c = {dq, D, C, true};
  multiply_small<T>(call, {query});

  SmallMatmul token{1, images, channels, channels}, q_weight{1, channels, channels, images};
  token.a = whole(dq, C, true);
  token.b = whole(call.read(t.q_weight), C);
  token.c = {by_query, 0, C, true};
  q_weight.a = op.transposed(token.a);
  q_weight.b = g.norm_weight ? whole(g.normed, C) : whole(g.cls, g.cls_stride);
  q_weight.c = {call.write(grads.q_weight), 0, C, false};
  SmallMatmul k_weight{g.heads, dim, channels, images}, v_weight = k_weight;
  k_weight.a = op.transposed(op.query());
  k_weight.b = op.of_head(g.du);
  k_weight.c = {call.write(grads.k_weight), D * C, C, false};
  v_weight.a = op.transposed(op.slice(g.grad_out, g.grad_out_stride));
  v_weight.b = op.of_head(g.pooled);
  v_weight.c = {call.write(grads.v_weight), D * C, C, false};
  multiply_small<T>(call, {token, q_weight, k_weight, v_weight});
}

template <class T>
void run_backward(CudaCall& call, const Tensors& t, Inputs<T> in, const Tensor& grad_out,
                  Gradients& grads, VectorGradients& vectors) {
  const int64_t B = in.batch, H = in.heads, C = in.channels;
  Workspace workspace(call, t.cls.scalar_type());
  Backward<T> g{in};
  g.grad_out = static_cast<const T*>(call.read(grad_out));
  g.grad_out_stride = grad_out.stride(0);
  g.v_bias = static_cast<const T*>(call.read(t.v_bias));
  float* dz = workspace.take<float>({B, H, C});
  g.dz = dz;
  g.rows = workspace.take<T>({B, 2 * H, C});
  g.numbers = workspace.take<float>({B, H, kNumbers});
  g.pooled = workspace.take<T>({B, H, C});
  g.values = static_cast<float*>(call.write(vectors.v_bias));
  g.part_sums = workspace.take<float>({B, in.parts, H, C});
  g.part_ds = workspace.take<float>({B, in.parts, H});
  g.grad_patches = static_cast<T*>(call.write(grads.patches));
  g.grad_token = workspace.take<float>({B, C});
  g.du = workspace.take<T>({B, H, C});
  float* by_query = workspace.take<float>({B, C});
  g.by_query = by_query;
  g.grad_cls = static_cast<T*>(call.write(grads.cls));
  if (in.norm_weight) {
    g.by_gain = static_cast<float*>(call.write(vectors.norm_weight));
    g.by_shift = static_cast<float*>(call.write(vectors.norm_bias));
    T* normed = workspace.take<T>({B, C});
    call.launch(norm_cls<T>, grid_of_warps(B), kThreads, 0, in, normed, false);
    g.normed = normed;
  }

  const Operands<T> op{in};
  SmallMatmul p{H, static_cast<int>(B), in.channels, in.head_dim};
  p.a = op.slice(g.grad_out, g.grad_out_stride);
  p.b = op.weight(call.read(t.v_weight));
  p.c = {dz, C, H * C, true};
  multiply_small<T>(call, {p});
  call.launch(fold_grads<T>, grid_of_warps(B * H), kThreads, 0, g);
  const bool fused = with_shape(in, [&](auto shape) {
    using S = decltype(shape);
    return launch_parts<BackwardMemory<T, S::kGroups>>(
        call, in, backward_tokens<T, S::kTiles, S::kGroups>, g);
  });
  if (!fused) spread_general(call, workspace, g);
  call.launch(join_grads<T>, grid_of_channels(in, B), kThreads, 0, g);
  weight_gradients(call, t, g, static_cast<float*>(call.write(vectors.q_bias)), by_query, grads);
  call.launch(finish_cls<T>, grid_of_warps(B), kThreads, 0, g);
}

// ---------------------------------------------------------------------- the ops

std::tuple<Tensor, Tensor, Tensor> clsattn_fwd(Tensor cls, Tensor patches, Tensor q_weight,
                                               Optional q_bias, Tensor k_weight, Tensor v_weight,
                                               Optional v_bias, Optional norm_weight,
                                               Optional norm_bias, Optional seed, int64_t heads,
                                               double eps, double scale, double dropout_p) {
  CudaCall call(cls);
  const Options options{heads, eps, scale, dropout_p};
  const Tensors t = make_tensors(
      {cls, patches, q_weight, k_weight, v_weight, q_bias, v_bias, norm_weight, norm_bias, seed},
      options);
  Tensor out = call.empty({t.cls.size(0), 1, t.cls.size(2)}, t.cls.scalar_type());
  Tensor head_state = call.empty(t.head_sizes(options), ScalarType::Float);
  Tensor token_state = call.empty(t.token_sizes(options), ScalarType::Float);
  for_storage(dtype_of(t.cls), [&](auto value) {
    using T = decltype(value);
    auto in = make_inputs<T>(call, t, options);
    in.head_state = static_cast<float*>(call.write(head_state));
    in.token_state = static_cast<float*>(call.write(token_state));
    run_forward<T>(call, t, in, out);
  });
  return {out, head_state, token_state};
}

using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors clsattn_bwd(Tensor grad_out, Tensor cls, Tensor patches, Tensor q_weight,
                        Optional q_bias, Tensor k_weight, Tensor v_weight, Optional v_bias,
                        Optional norm_weight, Optional norm_bias, Tensor head_state,
                        Tensor token_state, Optional seed, int64_t heads, double eps, double scale,
                        double dropout_p) {
  CudaCall call(cls);
  const Options options{heads, eps, scale, dropout_p};
  const Tensors t = make_tensors(
      {cls, patches, q_weight, k_weight, v_weight, q_bias, v_bias, norm_weight, norm_bias, seed},
      options);
  check_clsattn_gradient(t, options, grad_out, head_state, token_state);
  grad_out = dense_last(grad_out);
  head_state = torch::stable::contiguous(head_state);
  token_state = torch::stable::contiguous(token_state);

  const auto storage = t.cls.scalar_type();
  const int64_t batch = t.cls.size(0), channels = t.cls.size(2);
  const auto square = [&] { return call.empty({channels, channels}, storage); };
  const auto rows = [&](bool there) {
    return call.empty({there ? batch : 0, channels}, ScalarType::Float);
  };
  Gradients grads{call.empty({batch, 1, channels}, storage),
                  call.empty({batch, t.patches.size(1), channels}, storage), square(), square(),
                  square()};
  const bool normed = t.norm_weight.has_value();
  VectorGradients vectors{rows(true), rows(true), rows(normed), rows(normed)};
  for_storage(dtype_of(t.cls), [&](auto value) {
    using T = decltype(value);
    auto in = make_inputs<T>(call, t, options);
    // Kernels of the forward write through these pointers, those of the backward only read.
    in.head_state = const_cast<float*>(static_cast<const float*>(call.read(head_state)));
    in.token_state = const_cast<float*>(static_cast<const float*>(call.read(token_state)));
    run_backward<T>(call, t, in, grad_out, grads, vectors);
  });
  const auto sum = [&](const Optional& there, const Tensor& parts) {
    return there.has_value() ? sum_parts(call, parts, storage) : call.empty({0}, storage);
  };
  return {grads.cls,
          grads.patches,
          grads.q_weight,
          sum(t.q_bias, vectors.q_bias),
          grads.k_weight,
          grads.v_weight,
          sum(t.v_bias, vectors.v_bias),
          sum(t.norm_weight, vectors.norm_weight),
          sum(t.norm_bias, vectors.norm_bias)};
}

}  // namespace
}  // namespace xattn

XATTN_CUDA_OPS(m) {
  m.impl("clsattn_fwd", TORCH_BOX(&xattn::clsattn_fwd));
  m.impl("clsattn_bwd", TORCH_BOX(&xattn::clsattn_bwd));
}
