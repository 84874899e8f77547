// Inner-patch attention on CUDA: checks, allocation, launches. The arithmetic is in
// ipsa_forward.cuh, ipsa_backward.cuh and ipsa_backward_tiled.cuh.
#include "ipsa_backward.cuh"
#include "ipsa_backward_tiled.cuh"

#include <algorithm>
#include <climits>
#include <tuple>

#include "common/cuda_call.h"
#include "ipsa_checks.h"

namespace xattn {
namespace {

using namespace ipsa_cuda;

// The arguments of both directions, and the copies of them that kernels read.
struct Inputs {
  Tensor qkv;
  std::optional<Tensor> bias_table, pad_qkv, seed, grad_out;
  IpsaOptions options;
};

void check(const Inputs& in) {
  check_ipsa(in.options, in.qkv, in.bias_table, in.pad_qkv, in.seed);
  if (in.grad_out.has_value()) check_ipsa_gradient(in.qkv, *in.grad_out);
  STD_TORCH_CHECK(in.qkv.size(1) <= INT_MAX / 2 && in.qkv.size(2) <= INT_MAX / 2,
                  "ipsa: a map must have less than 2^30 rows and columns");
}

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Whether the rows of a map, of one pixel and head, start at multiples of 16 bytes.
bool aligned_map(const Tensor& t) {
  if (!aligned(t)) return false;
  for (int i = 0; i < 3; ++i) {
    if (t.stride(i) * static_cast<int64_t>(t.element_size()) % 16 != 0) return false;
  }
  return true;
}

// The map itself where kernels can read it, fast if its heads allow that, else a copy.
Tensor readable(const Tensor& t, bool whole_pieces) {
  const Tensor dense = dense_last(t);
  return whole_pieces && !aligned_map(dense) ? torch::stable::contiguous(dense) : dense;
}

// Brings the tensors into the form that kernels read. Whether a head's rows may be taken 16 bytes
// at a time, which a contiguous tensor at an odd address forbids.
bool prepare(Inputs& in) {
  const int64_t head_dim = in.qkv.size(3) / 3 / in.options.heads;
  bool wide = head_dim * static_cast<int64_t>(in.qkv.element_size()) % 16 == 0;
  in.qkv = readable(in.qkv, wide);
  wide = wide && aligned_map(in.qkv);
  if (in.grad_out.has_value()) {
    in.grad_out = readable(*in.grad_out, wide);
    wide = wide && aligned_map(*in.grad_out);
  }
  in.bias_table = contiguous_or_null(in.bias_table);
  in.pad_qkv = contiguous_or_null(in.pad_qkv);
  return wide && (!in.pad_qkv.has_value() || aligned(*in.pad_qkv));
}

template <class T>
Args<T> make_args(CudaCall& call, const Inputs& in, bool wide) {
  const IpsaOptions& o = in.options;
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  Args<T> a{};
  a.height = small(in.qkv.size(1));
  a.width = small(in.qkv.size(2));
  a.heads = small(o.heads);
  a.head_dim = small(in.qkv.size(3) / 3 / o.heads);
  a.window_h = small(o.window_h);
  a.window_w = small(o.window_w);
  a.shift_h = small(o.shift_h);
  a.shift_w = small(o.shift_w);
  a.windows_y = small((a.height + o.window_h - 1) / o.window_h);
  a.windows_x = small((a.width + o.window_w - 1) / o.window_w);
  a.windows = in.qkv.size(0) * a.windows_y * a.windows_x;
  a.scale = static_cast<float>(o.scale);
  a.dropout = make_dropout(call.read(in.seed), o.dropout_p);
  a.wide = wide;
  a.qkv = static_cast<const T*>(call.read(in.qkv));
  a.bias_table = static_cast<const T*>(call.read(in.bias_table));
  a.pad_qkv = static_cast<const T*>(call.read(in.pad_qkv));
  a.grad_out = static_cast<const T*>(call.read(in.grad_out));
  for (int i = 0; i < 3; ++i) {
    a.qkv_stride[i] = in.qkv.stride(i);
    a.grad_out_stride[i] = in.grad_out.has_value() ? in.grad_out->stride(i) : 0;
  }
  return a;
}

constexpr size_t kSharedOfAnyCard = 99 * 1024;
constexpr int64_t kBlocks = 4096;  // of runs: some ten for every place on a large card

// Cuts the windows into runs of one block each, by sizes alone, so that sums come out the same
// everywhere; returns how many. each: blocks that go through a run.
template <class T>
int64_t cut_into_runs(Args<T>& a, int64_t each, int64_t blocks) {
  const int64_t wanted = std::max<int64_t>(1, blocks / each);
  a.block_run = std::max<int64_t>(1, (a.windows + wanted - 1) / wanted);
  return (a.windows + a.block_run - 1) / a.block_run;
}

dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT_MAX, "ipsa: too many windows for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

template <int kD, int kN>
struct WindowKernel {
  static constexpr int kChannels = kD, kColumns = kN;
};

// f(WindowKernel of a call), where there is one: channels of a head, keys by 8. 32 channels and 56
// keys hold the heads and windows of CAT; float takes half the channels to fit every card.
template <class T, class F>
bool for_windows(const Args<T>& a, F&& f) {
  const int tokens = a.window_h * a.window_w;
  if (tokens > kTile || a.head_dim > (kIsShort<T> ? 64 : 32)) return false;
  if constexpr (kIsShort<T>) {
    if (a.head_dim > 32) {
      f(WindowKernel<64, 8>());
      return true;
    }
    if (tokens <= 56) {
      f(WindowKernel<32, 7>());
      return true;
    }
  }
  f(WindowKernel<32, 8>());
  return true;
}

template <class T>
void launch_forward(CudaCall& call, Args<T> a) {
  const bool whole = for_windows(a, [&](auto kernel) {
    constexpr int kD = decltype(kernel)::kChannels, kN = decltype(kernel)::kColumns;
    const int64_t runs = cut_into_runs(a, a.heads, kBlocks);
    static_assert(kForwardShared<T, kD> <= kSharedOfAnyCard);
    call.launch(forward_windows<T, kD, kN>, grid_of(runs * a.heads), kThreads,
                kForwardShared<T, kD>, a);
  });
  if (whole) return;
  const int64_t tiles = (a.window_h * a.window_w + kTile - 1) / kTile;
  call.launch(forward_tiled<T>, grid_of(a.windows * tiles * a.heads), kThreads,
              3 * kTileSize<kChunk<T>> * sizeof(T), a);
}

Tensor ipsa_fwd(Tensor qkv, std::optional<Tensor> bias_table, std::optional<Tensor> pad_qkv,
                std::optional<Tensor> seed, int64_t heads, int64_t window_h, int64_t window_w,
                int64_t shift_h, int64_t shift_w, double scale, double dropout_p) {
  Inputs in{qkv,  bias_table,   pad_qkv,
            seed, std::nullopt, {heads, window_h, window_w, shift_h, shift_w, scale, dropout_p}};
  check(in);
  CudaCall call(in.qkv);
  const bool wide = prepare(in);
  Tensor out =
      call.empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv.scalar_type());
  for_storage(dtype_of(qkv), [&](auto value) {
    using T = decltype(value);
    Args<T> a = make_args<T>(call, in, wide);
    a.out = static_cast<T*>(call.write(out));
    launch_forward(call, a);
  });
  return out;
}

// Parts of the gradients that windows share, one of each for every run and tile; empty where the
// call has no such gradient.
struct Parts {
  Tensor bias, pad;

  explicit Parts(CudaCall& call)
      : bias(call.empty({0}, torch::headeronly::ScalarType::Float)), pad(bias) {}

  template <class T>
  void allocate(CudaCall& call, Args<T>& a, int64_t count) {
    if (a.bias_table != nullptr) {
      bias = call.empty({count, bins(a), a.heads}, torch::headeronly::ScalarType::Float);
      a.bias_parts = static_cast<float*>(call.write(bias));
    }
    if (a.pad_qkv != nullptr) {
      pad = call.empty({count, 3 * a.heads * a.head_dim}, torch::headeronly::ScalarType::Float);
      a.pad_parts = static_cast<float*>(call.write(pad));
    }
  }
  template <class T>
  static int64_t bins(const Args<T>& a) {
    return (2 * int64_t{a.window_h} - 1) * (2 * int64_t{a.window_w} - 1);
  }
};

template <class T>
Parts launch_backward(CudaCall& call, Args<T> a) {
  Parts parts(call);
  const bool whole = for_windows(a, [&](auto kernel) {
    constexpr int kD = decltype(kernel)::kChannels, kN = decltype(kernel)::kColumns;
    const int64_t runs = cut_into_runs(a, a.heads, kBlocks);
    parts.allocate(call, a, runs);
    static_assert(sizeof(BackwardShared<T, kD, kN>) <= kSharedOfAnyCard);
    call.launch(backward_windows<T, kD, kN>, grid_of(runs * a.heads), kThreads,
                sizeof(BackwardShared<T, kD, kN>), a);
  });
  if (whole) return parts;
  constexpr int64_t kLargestParts = int64_t{1} << 24;  // floats
  const int64_t tiles = (a.window_h * a.window_w + kTile - 1) / kTile;
  const int64_t each = tiles * a.heads;
  const int64_t runs =
      cut_into_runs(a, each, std::min<int64_t>(kBlocks, kLargestParts / Parts::bins(a)));
  parts.allocate(call, a, runs * tiles);
  Tensor statistics =
      call.empty({a.windows * a.heads, 3, tiles * kTile}, torch::headeronly::ScalarType::Float);
  a.statistics = static_cast<float*>(call.write(statistics));
  static_assert(sizeof(BiasShared<T>) <= kSharedOfAnyCard);  // the largest of the three
  static_assert(sizeof(ColumnsShared<T>) <= sizeof(BiasShared<T>));
  call.launch(backward_rows<T>, grid_of(a.windows * each), kThreads, sizeof(TilePair<T>), a);
  call.launch(backward_columns<T>, grid_of(runs * each), kThreads, sizeof(ColumnsShared<T>), a);
  if (a.bias_parts != nullptr) {
    call.launch(backward_bias<T>, grid_of(runs * each), kThreads, sizeof(BiasShared<T>), a);
  }
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> ipsa_bwd(Tensor grad_out, Tensor qkv,
                                            std::optional<Tensor> bias_table,
                                            std::optional<Tensor> pad_qkv,
                                            std::optional<Tensor> seed, int64_t heads,
                                            int64_t window_h, int64_t window_w, int64_t shift_h,
                                            int64_t shift_w, double scale, double dropout_p) {
  Inputs in{qkv,  bias_table, pad_qkv,
            seed, grad_out,   {heads, window_h, window_w, shift_h, shift_w, scale, dropout_p}};
  check(in);
  CudaCall call(in.qkv);
  const bool wide = prepare(in);
  const auto dtype = qkv.scalar_type();
  Tensor grad_qkv = call.empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3)}, dtype);
  Tensor grad_table = call.empty({0}, dtype), grad_pad = call.empty({0}, dtype);
  for_storage(dtype_of(qkv), [&](auto value) {
    using T = decltype(value);
    Args<T> a = make_args<T>(call, in, wide);
    a.grad_qkv = static_cast<T*>(call.write(grad_qkv));
    const Parts parts = launch_backward(call, a);
    if (bias_table.has_value()) grad_table = sum_parts(call, parts.bias, dtype);
    if (pad_qkv.has_value()) grad_pad = sum_parts(call, parts.pad, dtype);
  });
  return {grad_qkv, grad_table, grad_pad};
}

}  // namespace

XATTN_CUDA_OPS(m) {
  m.impl("ipsa_fwd", TORCH_BOX(&ipsa_fwd));
  m.impl("ipsa_bwd", TORCH_BOX(&ipsa_bwd));
}

}  // namespace xattn
