// The gradient of the relative table. A block takes tiles of queries of one head against all keys
// among the tokens: it sums the logits' gradients of a pair of tiles over its share of the images,
// then folds the sums by the distances between the tokens into bins of its own.
#pragma once

#include "digest_backward.cuh"

namespace xattn::digest_cuda {

// Fewer columns at once: rows are loaded anew for every image, too.
template <class L>
struct TableLayout : L {
  static constexpr int kColumns = kStep;
};

template <class L>
struct alignas(16) TableMemory {
  using T = typename L::Value;
  static constexpr bool kPipelined = L::kFast && kIsShort<T>;  // float's tiles would fill it
  static constexpr int kStages = kPipelined ? 2 : 1;
  static constexpr int kSumStride = kStep + 1;
  T rows[kStages][2][kRows * L::kStride];
  T columns[kStages][2][L::kColumns * L::kStride];
  float sums[kRows * kSumStride];
  typename Relative<T, L::kFast>::Place places[kStep];

  XATTN_DEVICE float* table() { return reinterpret_cast<float*>(this + 1); }
  static size_t bytes(int grid_h, int grid_w) {
    return sizeof(TableMemory) +
           Relative<T, L::kFast>::shared_floats(grid_h, grid_w) * sizeof(float);
  }
};

// Patches [begin, end) of a tile of tokens from `first`, in rows [top, bottom] of the grid.
struct PatchRange {
  int first, begin, end, top, bottom;
  XATTN_DEVICE PatchRange(const Args& a, int token, int count)
      : first(token - a.prefix),
        begin(max(first, 0)),
        end(min(token + count, a.tokens) - a.prefix),
        top(begin / a.grid_w),
        bottom((end - 1) / a.grid_w) {}
  XATTN_DEVICE bool empty() const { return end <= begin; }
  // Columns of row y.
  XATTN_DEVICE int left(int y, int width) const { return max(begin - y * width, 0); }
  XATTN_DEVICE int right(int y, int width) const { return min(end - y * width, width); }
};

// Sum over the pairs of tokens that are dy rows and dx columns apart, in whichever direction.
template <int kStride>
XATTN_DEVICE float sum_of_pairs(const float* sums, const PatchRange& query, const PatchRange& key,
                                int width, int dy, int dx) {
  float sum = 0;
  for (int y = query.top; y <= query.bottom; ++y) {
    for (int down = dy > 0 ? -1 : 1; down <= 1; down += 2) {
      const int key_y = y + down * dy;
      if (key_y < key.top || key_y > key.bottom) continue;
      for (int right = dx > 0 ? -1 : 1; right <= 1; right += 2) {
        const int shift = right * dx;
        const int begin = max(query.left(y, width), key.left(key_y, width) - shift);
        const int end = min(query.right(y, width), key.right(key_y, width) - shift);
        const int row = y * width - query.first, column = key_y * width + shift - key.first;
        for (int x = begin; x < end; ++x) sum += sums[(row + x) * kStride + column + x];
      }
    }
  }
  return sum;
}

template <int kStride>
XATTN_DEVICE void fold(float* bins, const float* sums, const PatchRange& query,
                       const PatchRange& key, int width) {
  if (query.empty() || key.empty()) return;
  const int nearest = max(0, max(key.top - query.bottom, query.top - key.bottom));
  const int farthest = max(key.bottom - query.top, query.bottom - key.top);
  for (int i = nearest * width + threadIdx.x; i < (farthest + 1) * width; i += kThreads) {
    bins[i] += sum_of_pairs<kStride>(sums, query, key, width, i / width, i % width);
  }
}

template <class L>
struct TableTile {
  using T = typename L::Value;
  using M = TableMemory<L>;
  using R = Relative<T, L::kFast>;
  const Args& a;
  const R& relative;
  M* memory;
  int head, first_query, first_key;
  typename R::Place queries[2];

  XATTN_DEVICE Image<T> image(int64_t index) const { return {a, index, head}; }

  XATTN_DEVICE void issue(int64_t index, int stage) const {
    const Image<T> of = image(index);
    load_rows<L, kRows>(memory->rows[stage][0], of.queries(first_query), true);
    load_rows<L, kRows>(memory->rows[stage][1], of.grads(first_query), true);
    load_rows<L, L::kColumns>(memory->columns[stage][0], of.keys(0, false, first_key), true);
    load_rows<L, L::kColumns>(memory->columns[stage][1], of.keys(1, false, first_key), true);
    ptx::cp_async_commit();
  }

  // x = {logits, g} of one image, before scale, bias and dropout.
  XATTN_DEVICE void multiply(float (&x)[2][kStepTiles][4], int64_t index, int64_t end,
                             int stage) const {
    if constexpr (M::kPipelined) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (index + 1 < end) issue(index + 1, stage ^ 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        FragmentA<T> left[L::kWidth / 16];
        load_left<L>(left, memory->rows[stage][i]);
        clear(x[i]);
        multiply_channels<L>(x[i], left, memory->columns[stage][i]);
      }
    } else {
      const Image<T> of = image(index);
      multiply_chunks<L, 2>(x, {of.queries(first_query), of.grads(first_query)},
                            {of.keys(0, false, first_key), of.keys(1, false, first_key)},
                            memory->rows[0], memory->columns[0], a);
    }
  }

  // total += dS of one image.
  XATTN_DEVICE void add(float (&total)[kStepTiles][4], int64_t index, int64_t end,
                        int stage) const {
    const int64_t unit = index * a.heads + head;
    RowState state[2];
    float delta[2];
    for (int half = 0; half < 2; ++half) {
      const int token = first_query + lane_row(half);
      state[half] = row_state(a, unit, token);
      delta[half] = token < a.tokens ? a.deltas[unit * a.tokens + token] : 0;
    }
    float x[2][kStepTiles][4];
    multiply(x, index, end, stage);
    if constexpr (!L::kFast) {
      const Keep keep(a, unit);
      if (keep.drops()) keep.weigh_by_query(x[1], first_query + warp_row(), first_key);
    }
    logits_by_query(x[0], a, relative, queries, false, memory->places, nullptr);
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float p =
            ptx::exp2((x[0][n][e] - state[e >> 1].top) * kLog2e) * state[e >> 1].inverse;
        total[n][e] += p * (x[1][n][e] - delta[e >> 1]);
      }
    }
  }
};

template <class L>
__global__ void __launch_bounds__(kThreads, kIsShort<typename L::Value>&& L::kFast ? 3 : 2)
    digest_backward_table(const Args a) {
  using T = typename L::Value;
  using M = TableMemory<L>;
  using R = Relative<T, L::kFast>;
  static_assert(L::kColumns == kStep);
  SHARED_DYNAMIC(M, memory);
  const int head = blockIdx.x % a.heads, part = blockIdx.x / a.heads;
  const int group = part % a.query_groups, share = part / a.query_groups;
  const int patches = a.grid_h * a.grid_w, tiles = ceil_div(a.tokens, kRows);
  float* const bins = a.table_parts + static_cast<int64_t>(blockIdx.x) * patches;
  for (int i = threadIdx.x; i < patches; i += kThreads) bins[i] = 0;
  const R relative(a, head, memory->table());
  const int64_t begin = a.batch * share / a.shares, end = a.batch * (share + 1) / a.shares;
  const int tile_begin = static_cast<int64_t>(tiles) * group / a.query_groups;
  const int tile_end = static_cast<int64_t>(tiles) * (group + 1) / a.query_groups;

  for (int tile = tile_begin; tile < tile_end; ++tile) {
    for (int first_key = 0; first_key < a.tokens; first_key += kStep) {
      const int first = tile * kRows;
      const TableTile<L> pair{a,
                              relative,
                              memory,
                              head,
                              first,
                              first_key,
                              {relative.query(min(first + lane_row(0), a.tokens - 1)),
                               relative.query(min(first + lane_row(1), a.tokens - 1))}};
      __syncthreads();
      if (threadIdx.x < kStep) {
        memory->places[threadIdx.x] =
            relative.key(min(first_key + static_cast<int>(threadIdx.x), a.tokens - 1));
      }
      if constexpr (M::kPipelined) pair.issue(begin, 0);
      float total[kStepTiles][4];
      clear(total);
      for (int64_t index = begin; index < end; ++index) {
        pair.add(total, index, end, M::kPipelined ? (index - begin) % 2 : 0);
      }
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          memory->sums[lane_row(e >> 1) * M::kSumStride + column_of(n, e)] = total[n][e];
        }
      }
      __syncthreads();
      fold<M::kSumStride>(bins, memory->sums, {a, first, kRows}, {a, first_key, kStep}, a.grid_w);
    }
  }
}

}  // namespace xattn::digest_cuda
