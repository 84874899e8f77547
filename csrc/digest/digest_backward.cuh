// Backward of digest attention. With P the weights, m the factors of dropout and dO the output's
// gradient:
//   g = (dO V^T) m,   delta = rowsum(P g),   dS = P (g - delta),
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = (P m)^T dO,   dbias = sum of dS.
// Rows give delta and dQ; columns give dK, dV and the digests' bias; the relative table has a
// kernel of its own (digest_table.cuh). delta is also rowsum(dO O), which would need no pass of its
// own; but where one weight is near 1, g and delta nearly cancel, and only a sum of these very g
// leaves the right difference.
#pragma once

#include "digest_keys.cuh"

namespace xattn::digest_cuda {

// What the backward needs to know of a query's row.
struct RowState {
  float top, inverse;
};
XATTN_DEVICE RowState row_state(const Args& a, int64_t unit, int token) {
  if (token >= a.tokens) return {-kLowest, 0};  // such a row has no weights
  const auto stats =
      *reinterpret_cast<const Pack<float, 2>*>(a.row_stats + 2 * (unit * a.tokens + token));
  return {stats.v[0], stats.v[1]};
}

// delta and dQ: one pass over all keys each.
template <class L>
__global__ void __launch_bounds__(kThreads, L::kBlocks) digest_backward_rows(const Args a) {
  using T = typename L::Value;
  using M = Memory<L, 2>;
  using R = typename M::R;
  SHARED_DYNAMIC(M, memory);
  const Block block(a, ceil_div(a.tokens, kRows));
  const int chunk = L::kFast ? 0 : blockIdx.y, first = block.tile * kRows;
  const int64_t unit = block.unit(a);
  const Image<T> image{a, block.image, block.head};
  const R relative(a, block.head, memory->table());
  const KeyColumns<L, 2> keys{a, image, relative, memory};
  const Keep keep(a, unit);
  const typename R::Place queries[2] = {relative.query(min(first + lane_row(0), a.tokens - 1)),
                                        relative.query(min(first + lane_row(1), a.tokens - 1))};
  const RowState state[2] = {row_state(a, unit, first + lane_row(0)),
                             row_state(a, unit, first + lane_row(1))};
  FragmentA<T> query[L::kFast ? L::kWidth / 16 : 1], grad[L::kFast ? L::kWidth / 16 : 1];
  if constexpr (L::kFast) {
    load_rows<L, kRows>(memory->rows[0], image.queries(first), true);
    load_rows<L, kRows>(memory->rows[1], image.grads(first), true);
    keys.issue(0, 0);
  }

  float result[L::kTiles][4], delta[2] = {};
  clear(result);
  const int tiles = key_tiles(a, L::kColumns);
  for (int turn = 0; turn < 2 * tiles; ++turn) {
    const bool second = turn >= tiles;
    const int t = second ? turn - tiles : turn, stage = turn % L::kStages;
    const KeyTile at = keys.tile(t);
    if (turn == tiles) {
      delta[0] = quad_sum(delta[0]);
      delta[1] = quad_sum(delta[1]);
    }
    if constexpr (L::kFast) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (turn == 0) {
        load_left<L>(query, memory->rows[0]);
        load_left<L>(grad, memory->rows[1]);
      }
      if (turn + 1 < 2 * tiles) keys.issue(t + 1 < tiles ? t + 1 : 0, (turn + 1) % L::kStages);
    }
#pragma unroll 1
    for (int step = 0; step < L::kColumns; step += kStep) {
      if (step >= at.count) break;
      float x[2][kStepTiles][4];  // logits, then P; g, then dS
      if constexpr (L::kFast) {
        clear(x[0]);
        clear(x[1]);
        multiply_channels<L>(x[0], query, memory->columns[stage][0] + step * L::kStride);
        multiply_channels<L>(x[1], grad, memory->columns[stage][1] + step * L::kStride);
      } else {
        __syncthreads();
        keys.mark(at, 0);
        multiply_chunks<L, 2>(
            x, {image.queries(first), image.grads(first)},
            {image.keys(0, at.digests, at.first), image.keys(1, at.digests, at.first)},
            memory->rows, memory->columns[0], a);
        if (second && a.chunks > 1) keys.reload(at, 0, chunk);
        if (keep.drops()) keep.weigh_by_query(x[1], first + warp_row(), at.number(a));
      }
      keys.logits(x[0], queries, at, stage, step);
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const RowState& row = state[e >> 1];
          const float p = ptx::exp2((x[0][n][e] - row.top) * kLog2e) * row.inverse;
          if (!second) delta[e >> 1] += p * x[1][n][e];
          x[1][n][e] = p * (x[1][n][e] - delta[e >> 1]);
        }
      }
      if (second) {
        multiply_weights<L>(result, x[1], memory->columns[stage][0] + step * L::kStride);
      }
    }
  }

  for (int half = 0; half < 2; ++half) {
    const int token = first + lane_row(half);
    if (lane_id() % 4 == 0 && chunk == 0 && token < a.tokens) {
      a.deltas[unit * a.tokens + token] = delta[half];
    }
  }
  const int64_t stride = 3 * a.channels();
  T* to = static_cast<T*>(a.grad_qkv) + (block.image * a.tokens + first) * stride +
          image.channel() + chunk * L::kWidth;
  store_rows<L>(result, {a.scale, a.scale}, memory->rows[0], to, stride, a.tokens - first,
                a.head_dim - chunk * L::kWidth, a.vector);
}

// Queries as columns.
template <class L>
struct QueryColumns {
  using T = typename L::Value;
  using M = Memory<L, 2>;
  using R = typename M::R;
  const Args& a;
  const Image<T>& image;
  const R& relative;
  M* memory;

  // Places and states of the queries from `first`.
  XATTN_DEVICE void mark(int first, int stage) const {
    const int64_t unit = image.image * a.heads + image.head;
    for (int i = threadIdx.x; i < L::kColumns; i += kThreads) {
      const int token = first + i;
      const RowState state = row_state(a, unit, token);
      memory->numbers[stage][0][i] = state.top;
      memory->numbers[stage][1][i] = state.inverse;
      memory->numbers[stage][2][i] = token < a.tokens ? a.deltas[unit * a.tokens + token] : 0;
      memory->places[stage][i] = relative.query(min(token, a.tokens - 1));
    }
  }
  XATTN_DEVICE void issue(int t) const {
    const int first = t * L::kColumns, stage = t % L::kStages;
    load_rows<L, L::kColumns>(memory->columns[stage][0], image.queries(first), true);
    load_rows<L, L::kColumns>(memory->columns[stage][1], image.grads(first), true);
    mark(first, stage);
    ptx::cp_async_commit();
  }
  XATTN_DEVICE void reload(int first, int chunk) const {
    __syncthreads();
    load_rows<L, L::kColumns>(memory->columns[0][0], image.queries(first).chunk(chunk, L::kWidth),
                              a.vector);
    load_rows<L, L::kColumns>(memory->columns[0][1], image.grads(first).chunk(chunk, L::kWidth),
                              a.vector);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
};

// dK, dV of 64 keys and, of digests, the sums of their bias. Products are taken transposed: keys
// are rows, so that weights are the left side of the next product where they are.
template <class L>
__global__ void __launch_bounds__(kThreads, L::kFast&& L::kWidth == 32 ? 3 : 2)
    digest_backward_columns(const Args a) {
  using T = typename L::Value;
  using M = Memory<L, 2>;
  using R = typename M::R;
  SHARED_DYNAMIC(M, memory);
  const Block block(a, key_tiles(a, kRows));
  const KeyTile mine = key_tile(a, block.tile, kRows);
  const int chunk = L::kFast ? 0 : blockIdx.y;
  const int64_t unit = block.unit(a);
  const Image<T> image{a, block.image, block.head};
  const R relative(a, block.head, memory->table());
  const QueryColumns<L> queries{a, image, relative, memory};
  const Keep keep(a, unit);
  typename R::Place places[2] = {};
  float biases[2] = {}, bias_sums[2] = {};
  // Terms cancel, and the tokens are many: what an addition rounds off is added to the next one.
  float rounded_off[2] = {};
  for (int half = 0; half < 2; ++half) {
    const int key = mine.first + min(lane_row(half), mine.count - 1);
    if (mine.digests) {
      biases[half] = digest_bias<T>(a, block.head, key);
    } else {
      places[half] = relative.key(key);
    }
  }
  const Rows<T> key_rows = image.keys(0, mine.digests, mine.first);
  const Rows<T> value_rows = image.keys(1, mine.digests, mine.first);
  FragmentA<T> key[L::kFast ? L::kWidth / 16 : 1], value[L::kFast ? L::kWidth / 16 : 1];
  if constexpr (L::kFast) {
    load_rows<L, kRows>(memory->rows[0], key_rows, true);
    load_rows<L, kRows>(memory->rows[1], value_rows, true);
    queries.issue(0);
  }

  float grad_key[L::kTiles][4], grad_value[L::kTiles][4];
  clear(grad_key);
  clear(grad_value);
  const int tiles = ceil_div(a.tokens, L::kColumns);
  for (int t = 0; t < tiles; ++t) {
    const int first = t * L::kColumns, stage = t % L::kStages;
    if constexpr (L::kFast) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (t == 0) {
        load_left<L>(key, memory->rows[0]);
        load_left<L>(value, memory->rows[1]);
      }
      if (t + 1 < tiles) queries.issue(t + 1);
    }
#pragma unroll 1
    for (int step = 0; step < L::kColumns; step += kStep) {
      if (first + step >= a.tokens) break;
      float x[2][kStepTiles][4];  // logits, then P m; g, then dS
      if constexpr (L::kFast) {
        clear(x[0]);
        clear(x[1]);
        multiply_channels<L>(x[0], key, memory->columns[stage][0] + step * L::kStride);
        multiply_channels<L>(x[1], value, memory->columns[stage][1] + step * L::kStride);
      } else {
        __syncthreads();
        queries.mark(first, 0);
        multiply_chunks<L, 2>(x, {key_rows, value_rows}, {image.queries(first), image.grads(first)},
                              memory->rows, memory->columns[0], a);
        if (a.chunks > 1) queries.reload(first, chunk);
      }
      logits_by_key(x[0], a, relative, places, mine.digests, biases, memory->places[stage] + step);
      float step_sums[2] = {};
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
        float factor[4] = {1, 1, 1, 1};
        if constexpr (!L::kFast) {
          if (keep.drops()) {
            keep.by_key(factor, mine.number(a) + warp_row(), first + step + n * 8);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = step + column_of(n, e);
          const float p = ptx::exp2((x[0][n][e] - memory->numbers[stage][0][column]) * kLog2e) *
                          memory->numbers[stage][1][column];
          x[0][n][e] = p * factor[e];
          x[1][n][e] = p * (x[1][n][e] * factor[e] - memory->numbers[stage][2][column]);
          step_sums[e >> 1] += x[1][n][e];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float term = step_sums[half] - rounded_off[half];
        const float sum = bias_sums[half] + term;
        rounded_off[half] = (sum - bias_sums[half]) - term;
        bias_sums[half] = sum;
      }
      multiply_weights<L>(grad_value, x[0], memory->columns[stage][1] + step * L::kStride);
      multiply_weights<L>(grad_key, x[1], memory->columns[stage][0] + step * L::kStride);
    }
  }

  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(bias_sums[half]);
    if (mine.digests && a.digest_parts != nullptr && chunk == 0 && lane_id() % 4 == 0 &&
        lane_row(half) < mine.count) {
      a.digest_parts[unit * a.digests + mine.first + lane_row(half)] = sum;
    }
  }
  const int64_t stride = (mine.digests ? 2 : 3) * a.channels();
  const int64_t token = block.image * (mine.digests ? a.digests : a.tokens) + mine.first;
  T* to = static_cast<T*>(mine.digests ? a.grad_digest_kv : a.grad_qkv) + token * stride +
          (mine.digests ? 0 : a.channels()) + image.channel() + chunk * L::kWidth;
  const int columns = a.head_dim - chunk * L::kWidth;
  store_rows<L>(grad_key, {a.scale, a.scale}, memory->rows[0], to, stride, mine.count, columns,
                a.vector);
  store_rows<L>(grad_value, {1.0f, 1.0f}, memory->rows[1], to + a.channels(), stride, mine.count,
                columns, a.vector);
}

}  // namespace xattn::digest_cuda
