// Backward of inner-patch attention for windows of one tile and heads of at most kD channels.
//
// With P the softmax weights, m the dropout factors and dO the output's gradient:
//   g = (dO V^T) m,   dS = P (g - rowsum(P g)),   dV = (P m)^T dO,
//   dQ = scale dS K,  dK = scale dS^T Q,          dbias = sum of dS over windows.
// P is recomputed; nothing but qkv was saved.
#pragma once

#include "ipsa_forward.cuh"
#include "ipsa_gradients.cuh"

namespace xattn::ipsa_cuda {

// Shared memory of a block: windows on their way, the weights and their gradients, the bias.
template <class T, int kD, int kN>
struct BackwardShared {
  static constexpr int kWeightStride = kTile + 8;
  T stages[kStages<T, kD>][4][kTileSize<kD>];  // q, k, v, dO
  T weights[kTile][kWeightStride];             // P m
  T gradients[kTile][kWeightStride];           // dS
  float bias[kN][kThreads][4];                 // each thread's own values
  PadSums<kD> pads;
};

// A block takes one head through a run of windows of at most 8 kN tokens; grid: runs x heads. The
// gradient of the bias stays in registers.
template <class T, int kD, int kN>
__global__ void __launch_bounds__(kThreads, kD <= 32 ? 3 : 2) backward_windows(const Args<T> a) {
  using Shared = BackwardShared<T, kD, kN>;
  constexpr int kWeightStride = Shared::kWeightStride;
  SHARED_DYNAMIC(Shared, shared);
  const int head = blockIdx.x % a.heads;
  const int64_t part = blockIdx.x / a.heads, first = part * a.block_run;
  const int64_t count = run_length(a, first);

  RowLoader<T, kD> loader(a, head);
  const Token loaded = token_at(a, loader.row());
  const auto load = [&](const Window& w, T(*stage)[kTileSize<kD>]) {
    loader.find(w, place_of(a, w, loaded));
    for (int which = 0; which < 3; ++which) loader.load_qkv(which, stage[which]);
    loader.load_grad(stage[3]);
    ptx::cp_async_commit();
  };
  Window next = window_at(a, first), w = next;
  if (kStages<T, kD> == 2) load(next, shared->stages[0]);

  const int first_row = warp_id() * 16;
  const ShiftMask mask(a);
  float bias_sums[kN][4] = {};
  {
    float bias[kN][4];
    window_bias(a, head, bias);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      *reinterpret_cast<Pack<float, 4>*>(shared->bias[n][threadIdx.x]) = {
          {bias[n][0], bias[n][1], bias[n][2], bias[n][3]}};
    }
  }
  shared->pads.clear();
  for (int i = kN * 8 + lane_column(); i < kTile; i += 8) {  // columns that no one else writes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      put_weights<T>(&shared->weights[first_row + lane_row(half)][i], 0, 0);
      put_weights<T>(&shared->gradients[first_row + lane_row(half)][i], 0, 0);
    }
  }

  for (int64_t i = 0; i < count; ++i) {
    auto* const stage = shared->stages[kStages<T, kD> == 2 ? i & 1 : 0];
    const T *const q = stage[0], *const k = stage[1], *const v = stage[2], *const grad = stage[3];
    if (kStages<T, kD> == 1) {
      __syncthreads();  // the last window was read
      load(w, stage);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    next = next_window(a, w);
    if (kStages<T, kD> == 2 && i + 1 < count) load(next, shared->stages[~i & 1]);

    // P and dS of the warp's queries
    float p[kN][4] = {}, ds[kN][4] = {};
    multiply_rows<T, kD>(p, q + first_row * kRowStride<kD>, k);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto bias = *reinterpret_cast<const Pack<float, 4>*>(shared->bias[n][threadIdx.x]);
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] = p[n][e] * a.scale + bias.v[e];
    }
    mask.apply(seams(a, w), p);
    float highest[2], total[2];
    row_max(p, highest);
    exponentials(p, highest, total);
    multiply_rows<T, kD>(ds, grad + first_row * kRowStride<kD>, v);
    const uint32_t keep = keep_bits(a.dropout, w.index * a.heads + head, first_row, 0, a.tokens());
    drop(a.dropout, keep, ds);
    logit_gradients<T>(p, total, ds);
#pragma unroll
    for (int e = 0; e < 4 * kN; ++e) bias_sums[e / 4][e % 4] += ds[e / 4][e % 4];
    drop(a.dropout, keep, p);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane_row(half), column = n * 8 + lane_column();
        put_weights<T>(&shared->weights[row][column], p[n][2 * half], p[n][2 * half + 1]);
        put_weights<T>(&shared->gradients[row][column], ds[n][2 * half], ds[n][2 * half + 1]);
      }
    }

    // dQ of the warp's queries, then dK and dV of as many keys
    T* to[2];
    bool padding[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Token token = token_at(a, first_row + lane_row(half));
      const Place place = place_of(a, w, token);
      to[half] = row_of(a, a.grad_qkv, w, place, 3 * a.channels(), head * a.head_dim);
      padding[half] = place.padding;
    }
    const float scale[2] = {a.scale, a.scale};
    float sums[kD / 8][4] = {};
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
      multiply_columns<T, kD>(sums, weights_as_a<T>(ds, t), k, t);
    }
    store_rows<T, kD>(a, sums, scale, to);
    __syncthreads();  // every warp's P and dS are there
    for (int which = 1; which <= 2; ++which) {
      const T* from = which == 1 ? shared->gradients[0] : shared->weights[0];
      float column_sums[kD / 8][4] = {};
#pragma unroll
      for (int t = 0; t < kTile / 16; ++t) {
        FragmentA<T> left;
        load_a_transposed(left, from + t * 16 * kWeightStride + first_row, kWeightStride);
        multiply_columns<T, kD>(column_sums, left, which == 1 ? q : grad, t);
      }
      T* const behind[2] = {to[0] ? to[0] + which * a.channels() : nullptr,
                            to[1] ? to[1] + which * a.channels() : nullptr};
      const float f = which == 1 ? a.scale : 1.0f, factor[2] = {f, f};
      store_rows<T, kD>(a, column_sums, factor, behind);
      if (a.pad_parts) shared->pads.add(which - 1, column_sums, f, padding);
    }
    w = next;
  }
  __syncthreads();
  if (a.pad_parts) shared->pads.store(a, part, head, 0);
  if (a.bias_parts) {
    auto* const tile = reinterpret_cast<float*>(shared->stages);
    static_assert(sizeof(shared->stages) >= kTile * kSumStride * sizeof(float));
    put_sums(bias_sums, tile);
    __syncthreads();
    add_bins(a, part, head, tile, 0, 0, true);
  }
}

}  // namespace xattn::ipsa_cuda
