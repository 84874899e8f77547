// Forward of digest attention: a block of 64 queries through all keys with one online softmax.
#pragma once

#include "digest_keys.cuh"

namespace xattn::digest_cuda {

// The softmax of a lane's two rows so far: largest logit, this lane's share of the sum of weights,
// and the weighted values.
template <class L>
struct Softmax {
  using T = typename L::Value;
  float top[2] = {kLowest, kLowest}, sum[2] = {};
  float out[L::kTiles][4];

  // x: from logits to weights relative to the new top.
  XATTN_DEVICE void add(float (&x)[kStepTiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float above = top[half];
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
        above = fmaxf(above, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
      }
      above = quad_max(above);
      const float before = ptx::exp2((top[half] - above) * kLog2e);
      top[half] = above;
      sum[half] *= before;
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          x[n][e] = ptx::exp2((x[n][e] - above) * kLog2e);  // an exact difference
          sum[half] += x[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < L::kTiles; ++n) {
        out[n][2 * half] *= before;
        out[n][2 * half + 1] *= before;
      }
    }
  }
};

template <class L>
__global__ void __launch_bounds__(kThreads, L::kBlocks) digest_forward(const Args a) {
  using T = typename L::Value;
  using M = Memory<L, 1>;
  using R = typename M::R;
  SHARED_DYNAMIC(M, memory);
  const Block block(a, ceil_div(a.tokens, kRows));
  const int chunk = L::kFast ? 0 : blockIdx.y, first = block.tile * kRows;
  const Image<T> image{a, block.image, block.head};
  const R relative(a, block.head, memory->table());
  const KeyColumns<L, 1> keys{a, image, relative, memory};
  const Keep keep(a, block.unit(a));
  // Rows beyond the last token are computed, too.
  const typename R::Place queries[2] = {relative.query(min(first + lane_row(0), a.tokens - 1)),
                                        relative.query(min(first + lane_row(1), a.tokens - 1))};
  FragmentA<T> query[L::kFast ? L::kWidth / 16 : 1];
  if constexpr (L::kFast) {
    load_rows<L, kRows>(memory->rows[0], image.queries(first), true);
    keys.issue(0, 0);
  }

  Softmax<L> softmax;
  clear(softmax.out);
  const int tiles = key_tiles(a, L::kColumns);
  for (int t = 0; t < tiles; ++t) {
    const KeyTile at = keys.tile(t);
    const int stage = t % L::kStages;
    if constexpr (L::kFast) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // all have left the other stage, too
      if (t == 0) load_left<L>(query, memory->rows[0]);
      if (t + 1 < tiles) keys.issue(t + 1, (t + 1) % L::kStages);
    }
#pragma unroll 1
    for (int step = 0; step < L::kColumns; step += kStep) {
      if (step >= at.count) break;
      float x[1][kStepTiles][4];
      if constexpr (L::kFast) {
        clear(x[0]);
        multiply_channels<L>(x[0], query, memory->columns[stage][0] + step * L::kStride);
      } else {
        __syncthreads();
        keys.mark(at, 0);
        multiply_chunks<L, 1>(x, {image.queries(first)}, {image.keys(0, at.digests, at.first)},
                              memory->rows, memory->columns[0], a);
        keys.reload(at, 1, chunk);
      }
      keys.logits(x[0], queries, at, stage, step);
      softmax.add(x[0]);
      if constexpr (!L::kFast) {
        if (keep.drops()) keep.weigh_by_query(x[0], first + warp_row(), at.number(a));
      }
      multiply_weights<L>(softmax.out, x[0], memory->columns[stage][1] + step * L::kStride);
    }
  }

  float inverse[2];
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(softmax.sum[half]);
    inverse[half] = sum == 0 ? 0 : 1 / sum;  // a sum of 0: every logit was -inf
    if (lane_id() % 4 == 0 && chunk == 0 && first + lane_row(half) < a.tokens) {
      const int64_t row = block.unit(a) * a.tokens + first + lane_row(half);
      *reinterpret_cast<Pack<float, 2>*>(a.row_stats +
                                         2 * row) = {{softmax.top[half], inverse[half]}};
    }
  }
  const int64_t stride = a.channels();
  T* to = static_cast<T*>(a.out) + (block.image * a.tokens + first) * stride + image.channel() +
          chunk * L::kWidth;
  store_rows<L>(softmax.out, inverse, memory->rows[0], to, stride, a.tokens - first,
                a.head_dim - chunk * L::kWidth, a.vector);
}

}  // namespace xattn::digest_cuda
