// Cross-patch attention on CUDA, direct form: what its launches are given.
//
// Tokens become rows; q, k, v and the result are products of all rows with a weight; the attention
// between them is one of many units. Nothing is kept from the forward but x.
#include <algorithm>

#include "cpsa_cuda.h"
#include "cpsa_direct.cuh"

namespace xattn::cpsa_cuda {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kParts = 64;  // most shares of a sum over all rows, and the fewest rows of one
constexpr int64_t kFewestRows = 256;
constexpr int64_t kMostBlocks = int64_t{1} << 20;  // of kernels that stride over the grid

HeadLayout head_layout(const Problem& p) {
  const auto rounded = [](int n) { return (n + 7) / 8 * 8; };
  const int dim = p.map.pixels / p.heads;
  return {p.map.pixels, rounded(p.map.pixels), p.heads, dim, rounded(dim)};
}

// Launches of one call, with their memory.
template <class T>
class Direct {
 public:
  Direct(CudaCall& call, const Problem& p)
      : call_(call),
        p_(p),
        head_(head_layout(p)),
        count_(p.map.batch * p.map.channels * p.map.tokens),
        width_(head_.width()),
        qkv_weight_(rows(3 * width_, head_.length)),
        qkv_bias_(rows(1, 3 * width_)),
        proj_weight_(rows(head_.length, width_)),
        proj_bias_(rows(1, head_.length)) {
    const WeightGrads<T> to{write(qkv_weight_), write(qkv_bias_), write(proj_weight_),
                            write(proj_bias_)};
    call_.launch(pad_weights<T>, grid_of(blocks(qkv_weight_.numel())), kThreads, 0, head_,
                 weights_of<T>(call_, p_), to);
  }

  void forward(Tensor& out) {
    const Tensor qkv = project(to_rows(p_.x));
    Tensor heads = rows(count_, width_);
    DirectCall<T> args = arguments(qkv, heads);
    attend(direct_result<T>, args);
    const Tensor result = multiply_rows<false>(heads, proj_weight_, head_.length, &proj_bias_);
    to_map(result, out);
  }

  void backward(const Tensor& grad_out, Gradients& grads) {
    const Tensor x = to_rows(p_.x), grad_rows = to_rows(grad_out), qkv = project(x);
    Tensor heads = rows(count_, width_), grad_qkv = rows(count_, 3 * width_);
    Tensor statistics = call_.empty({2, count_ * p_.heads}, ScalarType::Float);
    Tensor delta = call_.empty({count_ * p_.heads}, ScalarType::Float);
    const Tensor grad_heads = multiply_rows<true>(grad_rows, proj_weight_, width_, nullptr);
    DirectCall<T> args = arguments(qkv, heads);
    args.statistics = static_cast<float*>(call_.write(statistics));
    args.delta = static_cast<float*>(call_.write(delta));
    args.grad_out = read(grad_heads);
    args.grad_qkv = write(grad_qkv);
    attend(direct_result<T>, args);
    attend(direct_queries<T>, args);
    attend(direct_keys<T>, args);
    to_map(multiply_rows<true>(grad_qkv, qkv_weight_, head_.length, nullptr), grads.x);

    Tensor sums[] = {outer(grad_qkv, x), columns(grad_qkv), outer(grad_rows, heads),
                     columns(grad_rows)};
    float* data[4];
    for (int i = 0; i < 4; ++i) data[i] = static_cast<float*>(call_.write(sums[i]));
    call_.launch(unpad_gradients<T>, grid_of(blocks(sums[0].numel())), kThreads, 0, head_,
                 WeightGrads<float>{data[0], data[1], data[2], data[3]},
                 weight_grads_of<T>(call_, p_, grads));
  }

 private:
  static constexpr int kThreads = 256;

  const T* read(const Tensor& t) const { return static_cast<const T*>(call_.read(t)); }
  T* write(Tensor& t) const { return static_cast<T*>(call_.write(t)); }
  Tensor rows(int64_t count, int64_t length) const {
    return call_.empty({count, length}, p_.x.scalar_type());
  }
  static int64_t blocks(int64_t threads) {
    return std::min(ceil_div(threads, kThreads), kMostBlocks);
  }
  int64_t move_blocks() const {
    const int64_t items = p_.map.batch * p_.map.tokens * ceil_div(p_.map.channels, kVector<T>);
    return std::min(ceil_div(items, kMoveThreads / 32), kMostBlocks);
  }

  Tensor to_rows(const Tensor& map) const {
    Tensor to = rows(count_, head_.length);
    call_.launch(map_to_rows<T>, grid_of(move_blocks()), kMoveThreads, 0, p_.map,
                 read_map<T>(call_, map), write(to), head_.length);
    return to;
  }
  void to_map(const Tensor& from, Tensor& map) const {
    call_.launch(rows_to_map<T>, grid_of(move_blocks()), kMoveThreads, 0, p_.map,
                 write_map<T>(call_, map), read(from), head_.length);
  }

  // [count, columns] = rows times a weight, kSumFirst: [depth, columns], else [columns, depth].
  template <bool kSumFirst>
  Tensor multiply_rows(const Tensor& left, const Tensor& weight, int64_t columns,
                       const Tensor* bias) const {
    Tensor result = rows(count_, columns);
    const int64_t depth = left.size(1);
    const Product product_of{count_, columns,        depth,
                             depth,  weight.size(1), ceil_div(depth, kDepth) * kDepth};
    call_.launch(product<T, false, kSumFirst, T>,
                 grid_of(ceil_div(count_, kBlock), ceil_div(columns, kBlock)), kProductThreads, 0,
                 product_of, read(left), read(weight), bias == nullptr ? nullptr : read(*bias),
                 write(result));
    return result;
  }
  Tensor project(const Tensor& x) const {
    return multiply_rows<false>(x, qkv_weight_, 3 * width_, &qkv_bias_);
  }

  // Rows of one of the shares into which a sum over all rows is cut: by their number alone.
  int64_t share() const {
    const int64_t parts = std::clamp<int64_t>(ceil_div(count_, kFewestRows), 1, kParts);
    return ceil_div(ceil_div(count_, parts), kDepth) * kDepth;
  }
  // left^T right over all rows, in float.
  Tensor outer(const Tensor& left, const Tensor& right) const {
    const int64_t m = left.size(1), n = right.size(1), parts = ceil_div(count_, share());
    Tensor sums = call_.empty({parts, m, n}, ScalarType::Float);
    call_.launch(product<T, true, true, float>,
                 grid_of(ceil_div(m, kBlock), ceil_div(n, kBlock), parts), kProductThreads, 0,
                 Product{m, n, count_, m, n, share()}, read(left), read(right),
                 static_cast<const T*>(nullptr), static_cast<float*>(call_.write(sums)));
    return sum_parts(call_, sums, ScalarType::Float);
  }
  // The sum of all rows, in float.
  Tensor columns(const Tensor& of) const {
    const int64_t n = of.size(1), parts = ceil_div(count_, share());
    Tensor sums = call_.empty({parts, n}, ScalarType::Float);
    call_.launch(column_sums<T>, grid_of(ceil_div(n, kThreads), parts), kThreads, 0, read(of),
                 count_, n, share(), static_cast<float*>(call_.write(sums)));
    return sum_parts(call_, sums, ScalarType::Float);
  }

  DirectCall<T> arguments(const Tensor& qkv, Tensor& heads) const {
    DirectCall<T> args{};
    args.units = p_.map.batch * p_.map.channels * p_.heads;
    args.tokens = p_.map.tokens;
    args.tiles = static_cast<int>(ceil_div(args.tokens, 16));
    args.parts = static_cast<int>(ceil_div(head_.padded, kPart));
    args.head = head_;
    args.scale = static_cast<float>(p_.scale * kLog2e);
    args.dropout = make_dropout(p_.dropout_p > 0 ? call_.read(p_.seed) : nullptr, p_.dropout_p);
    args.qkv = read(qkv);
    args.out = write(heads);
    return args;
  }
  void attend(void (*kernel)(DirectCall<T>), const DirectCall<T>& args) const {
    const int64_t items = args.units * args.tiles * args.parts;
    call_.launch(kernel, grid_of(ceil_div(items, kDirectWarps)), kDirectWarps * 32,
                 kDirectWarps * DirectTiles<T>::kBytes, args);
  }

  CudaCall& call_;
  const Problem& p_;
  HeadLayout head_;
  int64_t count_, width_;                                   // rows; columns of all heads
  Tensor qkv_weight_, qkv_bias_, proj_weight_, proj_bias_;  // padded
};

}  // namespace

void direct_forward(CudaCall& call, const Problem& p, Tensor& out) {
  for_storage(p.dtype, [&](auto value) { Direct<decltype(value)>(call, p).forward(out); });
}

void direct_backward(CudaCall& call, const Problem& p, const Tensor& grad_out, Gradients& grads) {
  for_storage(p.dtype,
              [&](auto value) { Direct<decltype(value)>(call, p).backward(grad_out, grads); });
}

}  // namespace xattn::cpsa_cuda
