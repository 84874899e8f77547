// Sums over the tokens that are a D x D matrix a head: softmax(K)^T V, and its gradient s Q^T G.
//
// A block takes a run of tokens and 64 x 64 channels, each warp 16 rows of the product. The softmax
// is online and never leaves registers: a fragment's rows are channels of k, so that a column's
// maximum is a maximum over a quad. Runs are combined in their order.
#pragma once

#include "convrel_products.cuh"

namespace xattn::convrel_cuda {

constexpr int kRunTokens = 64;  // of a tile
constexpr int kRunSteps = kRunTokens / 16;

struct ContextArgs {
  const void *left, *right;  // k and v, or q and grad_out: [batch, tokens, ...] at channel 0
  int64_t left_stride[2], right_stride[2];
  float* shares;           // [parts][batch][channels][row_values]
  void* product;           // left * right [batch, tokens, ...] at channel 0, contiguous; or null
  int64_t product_stride;  // of a token
  int64_t batch, tokens;
  Bands bands;
  int parts, part_tiles;  // tiles of a part
  int row_values;
  float scale;
  bool whole;  // there is one part: the sums are divided
  bool vector;
};

template <class T>
constexpr size_t kContextShared = 4 * kRunTokens * kTileRow * sizeof(T);

// Where a block of the grid stands: tiles of columns x tiles of rows x bands x parts x images.
struct ContextBlock {
  int column, row;  // the first channels of its tiles
  int part;
  int64_t image;
  Band band;

  XATTN_DEVICE explicit ContextBlock(const ContextArgs& a) {
    const int tiles = a.bands.tiles;
    int64_t at = blockIdx.x;
    column = static_cast<int>(at % tiles) * kTileChannels;
    row = static_cast<int>((at /= tiles) % tiles) * kTileChannels;
    band = a.bands.of(static_cast<int>((at /= tiles) % a.bands.count));
    part = static_cast<int>((at /= a.bands.count) % a.parts);
    image = at / a.parts;
    column += band.start;
    row += band.start;
  }
};

// The values of an A fragment by its columns 0 .. 7 and 8 .. 15, as in C fragments.
template <class T>
XATTN_DEVICE void values_of(const FragmentA<T>& a, float (&left)[4], float (&right)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Pack<T, 2> pair;
    memcpy(&pair, &a.pairs[i], sizeof(pair));
    float* to = (i < 2 ? left : right) + i % 2 * 2;
    to[0] = to_float(pair.v[0]);
    to[1] = to_float(pair.v[1]);
  }
}

// A warp's columns of k: their maxima and sums so far, of rows g and g + 8 of its fragments.
struct ColumnSoftmax {
  float highest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};  // of this lane's tokens

  // The exponentials of a tile of `count` tokens in place, and what is left of earlier sums.
  XATTN_DEVICE void step(float (&left)[kRunSteps][4], float (&right)[kRunSteps][4], int count,
                         float (&kept)[2]) {
    float level[2];
    if (count < kRunTokens) drop_beyond(left, right, count);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = highest[r];
#pragma unroll
      for (int t = 0; t < kRunSteps; ++t) {
        top = fmaxf(top, fmaxf(left[t][2 * r], left[t][2 * r + 1]));
        top = fmaxf(top, fmaxf(right[t][2 * r], right[t][2 * r + 1]));
      }
      top = quad_max(top);
      level[r] = top == -INFINITY ? 0.f : top;  // nothing but -inf so far
      kept[r] = ptx::exp2((highest[r] - level[r]) * kLog2e);
      highest[r] = top;
      total[r] *= kept[r];
    }
#pragma unroll
    for (int t = 0; t < kRunSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[t][i] = ptx::exp2((left[t][i] - level[i / 2]) * kLog2e);
        right[t][i] = ptx::exp2((right[t][i] - level[i / 2]) * kLog2e);
        total[i / 2] += left[t][i] + right[t][i];
      }
    }
  }

 private:
  XATTN_DEVICE void drop_beyond(float (&left)[kRunSteps][4], float (&right)[kRunSteps][4],
                                int count) const {
    const int first = lane_id() % 4 * 2;
#pragma unroll
    for (int t = 0; t < kRunSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * 16 + first + i % 2;
        if (token >= count) left[t][i] = -INFINITY;
        if (token + 8 >= count) right[t][i] = -INFINITY;
      }
    }
  }
};

// A warp's 16 rows of the 64 x 64 sums.
struct ContextSums {
  float sum[8][4] = {};

  XATTN_DEVICE void scale(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] *= factor[i / 2];
    }
  }

  // += a (16 channels x 16 tokens) times tokens of `right`; bit n of blocks: columns 8 n .. 8 n
  // + 7.
  template <class T>
  XATTN_DEVICE void add(const FragmentA<T>& a, const T* right, uint32_t blocks) {
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      if ((blocks >> n & 3) == 0) continue;
      FragmentB<T> b[2];
      load_b_pair_transposed(b, right + 8 * n, kTileRow);
      multiply_add(sum[n], a, b[0]);
      multiply_add(sum[n + 1], a, b[1]);
    }
  }

  // The entries that are a head's. rows: [channels][row_values] of an image; row, column: the first
  // channels of the warp's rows and of the columns.
  XATTN_DEVICE void store(float* rows, const ContextArgs& a, const Band& band, int row,
                          int column) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + lane_id() / 4 + i / 2 * 8;
        const int c = column + 8 * n + lane_id() % 4 * 2 + i % 2;
        const int head = r / a.bands.unit * a.bands.unit;
        if (r < band.low || r >= band.high || c < head || c >= head + a.bands.unit) continue;
        rows[static_cast<int64_t>(r) * a.row_values + c - head] = sum[n][i];
      }
    }
  }
};

// product = left * right of a tile of tokens, for the channels of both.
template <class T>
XATTN_DEVICE void store_product(const ContextArgs& a, const ContextBlock& block, const T* left,
                                const T* right, int64_t first, int count) {
  T* to = static_cast<T*>(a.product) + (block.image * a.tokens + first) * a.product_stride;
  const int pair = 2 * lane_id();
  for (int t = threadIdx.x / 32; t < count; t += kStripThreads / 32) {
    const auto x = load_pair(left + t * kTileRow + pair),
               y = load_pair(right + t * kTileRow + pair);
    store_pair(to + t * a.product_stride, block.row + pair, block.band,
               {{x.v[0] * y.v[0], x.v[1] * y.v[1]}}, a.vector);
  }
}

// shares: of each channel its row of softmax(k)^T v, its maximum and one over its sum; of several
// parts e^(k - maximum)^T v, maximum and sum. Without kSoftmax: scale * left^T right.
template <class T, bool kSoftmax>
__global__ __launch_bounds__(kStripThreads) void sum_context(ContextArgs a) {
  SHARED_DYNAMIC(T, memory);
  constexpr int kRun = kRunTokens * kTileRow;
  const ContextBlock block(a);
  const Band& band = block.band;
  const auto rows_of = [&](const void* data, const int64_t* stride, int c) {
    const T* image = static_cast<const T*>(data) + block.image * stride[0] + c;
    return ChannelRows<T>{image, stride[1], band.end - c, a.vector};
  };
  const auto left = rows_of(a.left, a.left_stride, block.row);
  const auto right = rows_of(a.right, a.right_stride, block.column);
  const int64_t begin = static_cast<int64_t>(block.part) * a.part_tiles * kRunTokens;
  const int64_t limit = begin + static_cast<int64_t>(a.part_tiles) * kRunTokens;
  const int64_t end = limit < a.tokens ? limit : a.tokens;
  const auto load = [&](int stage, int64_t first) {
    const int64_t count = end - first;
    const int tokens = count < kRunTokens ? static_cast<int>(count) : kRunTokens;
    const TokenTile tile{first, 0, kRunTokens, 1, tokens};
    load_tile<kRunTokens, kTileRow>(memory + 2 * stage * kRun, left, tile);
    load_tile<kRunTokens, kTileRow>(memory + (2 * stage + 1) * kRun, right, tile);
    ptx::cp_async_commit();
  };

  const int warp = threadIdx.x / 32;
  const uint32_t blocks = head_blocks(a.bands, band, block.row, block.column) >> (8 * warp) & 255;
  ColumnSoftmax softmax;
  ContextSums sums;
  load(0, begin);
  int stage = 0;
  for (int64_t first = begin; first < end; first += kRunTokens, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (first + kRunTokens < end) load(stage ^ 1, first + kRunTokens);
    const T *x = memory + 2 * stage * kRun, *y = x + kRun;
    const int count = end - first < kRunTokens ? static_cast<int>(end - first) : kRunTokens;
    if (a.product != nullptr && block.row == block.column) {
      store_product(a, block, x, y, first, count);
    }
    if (blocks == 0) continue;
    FragmentA<T> fragments[kRunSteps];
#pragma unroll
    for (int t = 0; t < kRunSteps; ++t) {
      load_a_transposed(fragments[t], x + t * 16 * kTileRow + warp * 16, kTileRow);
    }
    if constexpr (kSoftmax) {
      float low[kRunSteps][4], high[kRunSteps][4], kept[2];
#pragma unroll
      for (int t = 0; t < kRunSteps; ++t) values_of(fragments[t], low[t], high[t]);
      softmax.step(low, high, count, kept);
      sums.scale(kept);
#pragma unroll
      for (int t = 0; t < kRunSteps; ++t) fragments[t] = as_a<T>(low[t], high[t]);
    }
#pragma unroll
    for (int t = 0; t < kRunSteps; ++t) sums.add(fragments[t], y + t * 16 * kTileRow, blocks);
  }

  float* share = a.shares + (block.part * a.batch + block.image) * a.bands.channels * a.row_values;
  const int row = block.row + warp * 16;
  if constexpr (kSoftmax) {
    float total[2] = {quad_sum(softmax.total[0]), quad_sum(softmax.total[1])};
    if (a.whole && blocks != 0) {
      total[0] = 1 / total[0];
      total[1] = 1 / total[1];
      sums.scale(total);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int c = row + lane_id() / 4 + 8 * r;
      if (lane_id() % 4 != 0 || block.row != block.column || c < band.low || c >= band.high)
        continue;
      float* statistics = share + static_cast<int64_t>(c) * a.row_values + a.bands.unit;
      statistics[0] = softmax.highest[r];
      statistics[1] = total[r];
    }
  } else {
    const float factor[2] = {a.scale, a.scale};
    sums.scale(factor);
  }
  sums.store(share, a, band, row, block.column);
}

constexpr int kCombineRows = 4;  // of a block, a warp each
constexpr int kCombineThreads = 32 * kCombineRows;

// state [rows][head_dim + 2] from shares [parts][rows][head_dim + 2]; in their order.
__global__ __launch_bounds__(kCombineThreads) void combine_context(const float* __restrict__ shares,
                                                                   float* __restrict__ state,
                                                                   int64_t rows, int head_dim,
                                                                   int parts) {
  const int64_t row = int64_t{1} * blockIdx.x * kCombineRows + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t row_values = head_dim + 2, part_values = rows * row_values;
  const float* share = shares + row * row_values;
  float highest = -INFINITY;
  for (int p = lane_id(); p < parts; p += 32) {
    highest = fmaxf(highest, share[p * part_values + head_dim]);
  }
  highest = warp_max(highest);
  const float level = highest == -INFINITY ? 0.f : highest;
  const auto factor = [&](int p) {
    return ptx::exp2((share[p * part_values + head_dim] - level) * kLog2e);
  };
  float total = 0.f;
  for (int p = lane_id(); p < parts; p += 32) {
    total += share[p * part_values + head_dim + 1] * factor(p);
  }
  const float inverse = 1 / warp_sum(total);
  float* to = state + row * row_values;
  for (int j = lane_id(); j < head_dim; j += 32) {
    float sum = 0.f;
    for (int p = 0; p < parts; ++p) sum += share[p * part_values + j] * factor(p);
    to[j] = sum * inverse;
  }
  if (lane_id() == 0) {
    to[head_dim] = highest;
    to[head_dim + 1] = inverse;
  }
}

// change [rows][head_dim + 1]: the gradient of the context from shares [parts][rows][head_dim], and
// delta, what the softmax owes: the sum of both over a row, rounded as in the product that delta is
// subtracted from.
template <class T>
__global__ __launch_bounds__(kCombineThreads) void combine_gradient(
    const float* __restrict__ shares, const float* __restrict__ state, float* __restrict__ change,
    int64_t rows, int head_dim, int parts) {
  const int64_t row = int64_t{1} * blockIdx.x * kCombineRows + threadIdx.x / 32;
  if (row >= rows) return;
  const float* context = state + row * (head_dim + 2);
  float* to = change + row * (head_dim + 1);
  float delta = 0.f;
  for (int j = lane_id(); j < head_dim; j += 32) {
    float sum = 0.f;
    for (int p = 0; p < parts; ++p) sum += shares[(p * rows + row) * head_dim + j];
    to[j] = sum;
    delta += to_float(from_float<T>(sum)) * context[j];
  }
  delta = warp_sum(delta);
  if (lane_id() == 0) to[head_dim] = delta;
}

}  // namespace xattn::convrel_cuda
