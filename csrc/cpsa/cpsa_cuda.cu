// Cross-patch attention on CUDA: checks, the absorbed form's launches, registration.
#include "cpsa_cuda.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "cpsa_backward.cuh"

namespace xattn::cpsa_cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Blocks over which items are spread: some for each multiprocessor of a large card. Each block of
// a backward stores sums, so their number must not depend on the card.
constexpr int kForwardBlocks = 1024, kBackwardBlocks = 256;
constexpr int kFewTokens = 16, kLargestBackward = 64;
constexpr int kStreamed = 64;  // keys in memory at a time where not all of them fit

int small(int64_t n) {
  STD_TORCH_CHECK(n <= std::numeric_limits<int>::max() / 4, "cpsa: the map is too large");
  return static_cast<int>(n);
}

bool absorbs(const Problem& p) {
  // A single token's softmax is 1 whatever the number of heads.
  const bool one_head = p.heads == 1 || p.map.tokens == 1;
  return one_head && p.dropout_p == 0 && p.map.pixels <= kColumns;
}

int slots_log2(int tokens) {
  int log2 = 0;
  while (1 << log2 < tokens) ++log2;
  return log2;
}

// A, a, B, b and the memory that they are in.
template <class T>
struct AbsorbedWeights {
  Tensor matrices, biases;
  Absorbed<T> pointers;

  AbsorbedWeights(CudaCall& call, const Problem& p)
      : matrices(call.empty({2, kMatrix}, p.x.scalar_type())),
        biases(call.empty({2, kColumns}, torch::headeronly::ScalarType::Float)) {
    T* const matrix = static_cast<T*>(call.write(matrices));
    float* const bias = static_cast<float*>(call.write(biases));
    pointers = {matrix, matrix + kMatrix, bias, bias + kColumns};
    call.launch(absorb<T>, grid_of(kAbsorbBlocks, 2), kAbsorbThreads, 0, weights_of<T>(call, p),
                p.map.pixels, static_cast<float>(p.scale * kLog2e), matrix, matrix + kMatrix, bias,
                bias + kColumns);
  }
};

template <class T>
void absorbed_forward(CudaCall& call, const Problem& p, Tensor& out) {
  const Geometry& g = p.map;
  const AbsorbedWeights<T> weights(call, p);
  ForwardCall<T> args{};
  args.map = g;
  args.x = read_map<T>(call, p.x);
  args.out = write_map<T>(call, out);
  args.weights = weights.pointers;
  const auto bytes = [](int64_t rows) {
    return SharedWeights<T>::kBytes + rows * kColumns * int64_t{sizeof(T)};
  };
  const int threads = kWarps<T> * 32;
  if (g.tokens <= kFewTokens) {
    args.slots_log2 = slots_log2(g.tokens);
    args.slots = 1 << args.slots_log2;
    args.groups = static_cast<int>(ceil_div(g.channels, kWarps<T> * 16 / args.slots));
    args.items = small(g.batch * args.groups);
    call.launch(forward_few<T>, grid_of(std::min(args.items, kForwardBlocks)), threads,
                bytes(kWarps<T> * 16), args);
    return;
  }
  args.groups = static_cast<int>(ceil_div(g.channels, kVector<T>));
  const int64_t all = ceil_div(g.tokens, kKeys) * kKeys, tiles = ceil_div(g.tokens, 16);
  const auto with_keys = [&](int64_t keys) { return bytes(kVector<T> * (16 + keys)); };
  const bool fits = with_keys(all) <= call.shared_limit();
  args.slots = static_cast<int>(fits ? all : kStreamed);
  // Few images and channels: their queries are shared out, at the cost of loading keys again.
  const int64_t alone = g.batch * args.groups;
  args.splits = static_cast<int>(std::clamp<int64_t>(kForwardBlocks / 2 / alone, 1, tiles));
  args.items = small(alone * args.splits);
  call.launch(forward_many<T>, grid_of(std::min(args.items, kForwardBlocks)), threads,
              with_keys(args.slots), args);
}

// How many channels a block of the backward loads at once, and how many of them are in flight.
struct BackwardPlan {
  int channels, in_flight;
  int64_t bytes;
};

// 0 channels where the absorbed form does not fit.
template <class T>
BackwardPlan plan_backward(const Problem& p, int64_t shared_limit) {
  if (!absorbs(p) || p.map.tokens > kLargestBackward) return {};
  if (p.map.tokens <= kFewTokens) {
    return {kVector<T>, kWarps<T>, BackwardTile<T, true>::bytes(kWarps<T>, kWarps<T>)};
  }
  using Tile = BackwardTile<T, false>;
  for (const int channels : {kVector<T>, kVector<T> / 2}) {
    for (int in_flight = kWarps<T> / Tile::kTilesOfRows; in_flight > 0; --in_flight) {
      const int64_t bytes = Tile::bytes(channels, in_flight);
      if (bytes <= shared_limit) return {channels, in_flight, bytes};
    }
  }
  return {};
}

template <class T>
void absorbed_backward(CudaCall& call, const Problem& p, const Tensor& grad_out,
                       const BackwardPlan& plan, Gradients& grads) {
  const Geometry& g = p.map;
  const AbsorbedWeights<T> weights(call, p);
  BackwardCall<T> args{};
  args.map = g;
  args.x = read_map<T>(call, p.x);
  args.grad_out = read_map<T>(call, grad_out);
  args.grad_x = write_map<T>(call, grads.x);
  args.weights = weights.pointers;
  args.channels = plan.channels;
  args.in_flight = plan.in_flight;
  const bool few = g.tokens <= kFewTokens;
  args.slots_log2 = few ? slots_log2(g.tokens) : 0;
  const int channels = few ? kWarps<T> * 16 >> args.slots_log2 : plan.channels;
  args.groups = static_cast<int>(ceil_div(g.channels, channels));
  args.items = small(g.batch * args.groups);
  const int blocks = std::min(args.items, kBackwardBlocks);
  Tensor parts = call.empty({blocks, kSums}, torch::headeronly::ScalarType::Float);
  args.sums = static_cast<float*>(call.write(parts));
  const auto kernel = few ? backward<T, true> : backward<T, false>;
  call.launch(kernel, grid_of(blocks), kWarps<T> * 32, plan.bytes, args);

  const Tensor sums = sum_parts(call, parts, torch::headeronly::ScalarType::Float);
  call.launch(weight_gradients<T>, grid_of(kAbsorbBlocks, 4), kAbsorbThreads, 0,
              weights_of<T>(call, p), g.pixels, static_cast<float>(p.scale * kLog2e),
              static_cast<const float*>(call.read(sums)), weight_grads_of<T>(call, p, grads));
}

// ------------------------------------------------------------------------------- the two ops

Problem make_problem(const CpsaTensors& in, const CpsaOptions& o) {
  check_cpsa(in, o);
  Problem p{in, {}, dtype_of(in.x), small(o.heads), o.scale, o.dropout_p};
  p.lay_out();
  Geometry& g = p.map;
  g.batch = in.x.size(0);
  g.height = small(in.x.size(1));
  g.width = small(in.x.size(2));
  g.channels = small(in.x.size(3));
  g.patch_h = small(o.patch_h);
  g.patch_w = small(o.patch_w);
  g.pixels = small(o.pixels());
  g.patches_x = static_cast<int>(ceil_div(g.width, g.patch_w));
  g.tokens = small(ceil_div(g.height, g.patch_h) * g.patches_x);
  return p;
}

Tensor new_like(const Tensor& t) {
  return torch::stable::new_empty(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
}

Tensor cpsa_fwd(Tensor x, Tensor qkv_weight, OptionalTensor qkv_bias, Tensor proj_weight,
                OptionalTensor proj_bias, OptionalTensor seed, int64_t patch_h, int64_t patch_w,
                int64_t heads, double scale, double dropout_p) {
  CudaCall call(x);
  const Problem p = make_problem({x, qkv_weight, proj_weight, qkv_bias, proj_bias, seed},
                                 {patch_h, patch_w, heads, scale, dropout_p});
  Tensor out = new_like(p.x);
  if (out.numel() == 0) return out;
  if (absorbs(p)) {
    for_storage(p.dtype, [&](auto value) { absorbed_forward<decltype(value)>(call, p, out); });
  } else {
    direct_forward(call, p, out);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpsa_bwd(
    Tensor grad_out, Tensor x, Tensor qkv_weight, OptionalTensor qkv_bias, Tensor proj_weight,
    OptionalTensor proj_bias, OptionalTensor seed, int64_t patch_h, int64_t patch_w, int64_t heads,
    double scale, double dropout_p) {
  CudaCall call(x);
  const Problem p = make_problem({x, qkv_weight, proj_weight, qkv_bias, proj_bias, seed},
                                 {patch_h, patch_w, heads, scale, dropout_p});
  check_cpsa_gradient(p, grad_out);
  grad_out = dense_last(grad_out);
  const Tensor nothing = torch::stable::new_empty(p.x, {0});
  Gradients grads{new_like(p.x), new_like(p.qkv_weight),
                  p.qkv_bias.has_value() ? new_like(*p.qkv_bias) : nothing, new_like(p.proj_weight),
                  p.proj_bias.has_value() ? new_like(*p.proj_bias) : nothing};
  if (p.x.numel() == 0) {
    for (Tensor* t : {&grads.qkv_weight, &grads.qkv_bias, &grads.proj_weight, &grads.proj_bias}) {
      torch::stable::zero_(*t);
    }
  } else {
    for_storage(p.dtype, [&](auto value) {
      using T = decltype(value);
      const BackwardPlan plan = plan_backward<T>(p, call.shared_limit());
      if (plan.channels > 0) {
        absorbed_backward<T>(call, p, grad_out, plan, grads);
      } else {
        direct_backward(call, p, grad_out, grads);
      }
    });
  }
  return {grads.x, grads.qkv_weight, grads.qkv_bias, grads.proj_weight, grads.proj_bias};
}

}  // namespace
}  // namespace xattn::cpsa_cuda

XATTN_CUDA_OPS(m) {
  m.impl("cpsa_fwd", TORCH_BOX(&xattn::cpsa_cuda::cpsa_fwd));
  m.impl("cpsa_bwd", TORCH_BOX(&xattn::cpsa_cuda::cpsa_bwd));
}
