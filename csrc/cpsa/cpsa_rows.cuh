// The direct form of cross-patch attention on CUDA, around the attention: tokens as rows of a
// matrix in memory, ordered (image, channel, token), and the projections of all of them.
//
// Rows and heads are filled up with zeros to lengths of whole 16-byte vectors.
#pragma once

#include "common/mma.cuh"
#include "cpsa_absorb.cuh"

namespace xattn::cpsa_cuda {

struct HeadLayout {
  int pixels, length;      // of a token, and of its row
  int heads, dim, padded;  // padded: of a head
  __host__ __device__ int width() const {
    return heads * padded;
  }  // of all heads of one of q, k, v
};

constexpr int kMoveThreads = 128;

// f(image, channel, token, offset of the token's row) for each vector of channels of each token, a
// warp at a time. Rows: [batch * channels * tokens, length].
template <class T, class F>
XATTN_DEVICE void for_tokens(const Geometry& g, int length, F f) {
  constexpr int kChannels = kVector<T>, kWarpsOfBlock = kMoveThreads / 32;
  const int vectors = (g.channels + kChannels - 1) / kChannels;
  const int64_t items = g.batch * vectors * g.tokens;
  for (int64_t i = int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / 32; i < items;
       i += int64_t{gridDim.x} * kWarpsOfBlock) {
    const int token = static_cast<int>(i % g.tokens);
    const int channel = static_cast<int>(i / g.tokens % vectors) * kChannels;
    const int64_t image = i / g.tokens / vectors;
    f(image, channel, token, ((image * g.channels + channel) * g.tokens + token) * length);
  }
}

template <class T>
__global__ void __launch_bounds__(kMoveThreads)
    map_to_rows(Geometry g, Map<const T> map, T* rows, int length) {
  constexpr int kChannels = kVector<T>;
  for_tokens<T>(g, length, [&](int64_t image, int channel, int token, int64_t row) {
    for (int pair = lane_id(); 2 * pair < length; pair += 32) {
      const auto values = read_pair<kChannels>(g, map, image, channel, token, pair);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (channel + c >= g.channels) break;
        T* const to = rows + row + int64_t{c} * g.tokens * length + 2 * pair;
        *reinterpret_cast<Pack<T, 2>*>(to) = {{values.pixel[0].v[c], values.pixel[1].v[c]}};
      }
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kMoveThreads)
    rows_to_map(Geometry g, Map<T> map, const T* rows, int length) {
  constexpr int kChannels = kVector<T>;
  for_tokens<T>(g, length, [&](int64_t image, int channel, int token, int64_t row) {
    for (int pair = lane_id(); 2 * pair < g.pixels; pair += 32) {
      PixelPair<T, kChannels> values;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const bool there = channel + c < g.channels;
        const T* const from = rows + row + int64_t{there ? c : 0} * g.tokens * length + 2 * pair;
        const auto both = *reinterpret_cast<const Pack<T, 2>*>(from);
        values.pixel[0].v[c] = both.v[0];
        values.pixel[1].v[c] = both.v[1];
      }
      write_pair(g, map, image, channel, token, pair, values);
    }
  });
}

// Element i of the padded qkv_weight [3, heads, padded, length] as it lies in [3 P, P], or -1.
XATTN_DEVICE int64_t qkv_element(const HeadLayout& h, int64_t i) {
  const int column = static_cast<int>(i % h.length), d = static_cast<int>(i / h.length % h.padded);
  const int64_t head = i / h.length / h.padded;  // of all three
  return column < h.pixels && d < h.dim ? (head * h.dim + d) * h.pixels + column : -1;
}
// Of the padded proj_weight [length, heads, padded] as it lies in [P, P].
XATTN_DEVICE int64_t proj_element(const HeadLayout& h, int64_t i) {
  const int d = static_cast<int>(i % h.padded), head = static_cast<int>(i / h.padded % h.heads);
  const int64_t row = i / h.padded / h.heads;
  return row < h.pixels && d < h.dim ? row * h.pixels + head * h.dim + d : -1;
}

// to[i] = from[element(i)], zeros where that is not.
template <class T>
XATTN_DEVICE void fill(T* to, const T* from, int64_t i, int64_t element) {
  to[i] = element < 0 || from == nullptr ? from_float<T>(0) : from[element];
}

// The weights, padded. The keys' bias adds the same number to a whole row of logits and cancels;
// left out, it cannot cost precision either.
template <class T>
__global__ void pad_weights(HeadLayout h, Weights<T> from, WeightGrads<T> to) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x, width = int64_t{h.heads} * h.padded;
  for (int64_t i = first; i < 3 * width * h.length; i += step) {
    fill(to.qkv, from.qkv, i, qkv_element(h, i));
  }
  for (int64_t i = first; i < h.length * width; i += step) {
    fill(to.proj, from.proj, i, proj_element(h, i));
  }
  for (int64_t i = first; i < 3 * width; i += step) {
    const int64_t d = i % h.padded, head = i / h.padded;
    const bool is_key = head >= h.heads && head < 2 * h.heads;
    fill(to.qkv_bias, from.qkv_bias, i, d < h.dim && !is_key ? head * h.dim + d : -1);
  }
  for (int64_t i = first; i < h.length; i += step) {
    fill(to.proj_bias, from.proj_bias, i, i < h.pixels ? i : -1);
  }
}

// The gradients of the weights as they came from those of the padded ones.
template <class T>
__global__ void unpad_gradients(HeadLayout h, WeightGrads<float> from, WeightGrads<T> to) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x, width = int64_t{h.heads} * h.padded;
  for (int64_t i = first; i < 3 * width * h.length; i += step) {
    const int64_t element = qkv_element(h, i);
    if (element >= 0) to.qkv[element] = from_float<T>(from.qkv[i]);
  }
  for (int64_t i = first; i < h.length * width; i += step) {
    const int64_t element = proj_element(h, i);
    if (element >= 0) to.proj[element] = from_float<T>(from.proj[i]);
  }
  for (int64_t i = first; i < 3 * width && to.qkv_bias != nullptr; i += step) {
    const int64_t d = i % h.padded, head = i / h.padded;
    const bool is_key = head >= h.heads && head < 2 * h.heads;
    if (d < h.dim) to.qkv_bias[head * h.dim + d] = from_float<T>(is_key ? 0 : from.qkv_bias[i]);
  }
  for (int64_t i = first; i < h.pixels && to.proj_bias != nullptr; i += step) {
    to.proj_bias[i] = from_float<T>(from.proj_bias[i]);
  }
}

// ---------------------------------------------------------------------------------- products

constexpr int kProductThreads = 128;
constexpr int kBlock = 64;  // rows and columns of a product that a block takes
constexpr int kDepth = 32;  // of a step
constexpr int kNarrow = kDepth + 8,
              kBroad = kBlock + 8;  // rows in shared memory, free of conflicts

// A block of an operand in shared memory: [kBlock, kDepth], or kSumFirst: [kDepth, kBlock].
template <bool kSumFirst, class T>
XATTN_DEVICE void load_operand(T* to, const T* from, int64_t stride, int64_t first, int64_t end,
                               int64_t depth, int64_t depth_end) {
  constexpr int kRows = kSumFirst ? kDepth : kBlock, kWide = kSumFirst ? kBlock : kDepth;
  constexpr int kVectors = kWide / kVector<T>;
  const int64_t row0 = kSumFirst ? depth : first, row_end = kSumFirst ? depth_end : end;
  const int64_t column0 = kSumFirst ? first : depth, column_end = kSumFirst ? end : depth_end;
  for (int i = threadIdx.x; i < kRows * kVectors; i += kProductThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector<T>;
    const bool there = row0 + row < row_end && column0 + column < column_end;
    const T* const at = from + (row0 + row) * stride + column0 + column;
    ptx::cp_async<16>(to + row * (kSumFirst ? kBroad : kNarrow) + column, there ? at : from, there);
  }
}

struct Product {
  int64_t rows, columns, depth;  // of c = a b; columns and depth are whole vectors
  int64_t a_stride, b_stride;
  int64_t share;  // of the depth that a block adds up, a multiple of kDepth
};

// c [rows, columns] = a b + bias. kSumFirst: the depth is the first dimension of an operand in
// memory, else the second. float c: parts [grid.z, rows, columns], each of its share of the depth.
// grid: rows x columns x shares, in blocks.
template <class T, bool kSumFirstA, bool kSumFirstB, class Out>
__global__ void __launch_bounds__(kProductThreads)
    product(Product p, const T* a, const T* b, const T* bias, Out* c) {
  constexpr int kOperand = kBlock * kNarrow > kDepth * kBroad ? kBlock * kNarrow : kDepth * kBroad;
  SHARED(T, tiles, [2][2][kOperand]);
  const int64_t row0 = int64_t{blockIdx.x} * kBlock, column0 = int64_t{blockIdx.y} * kBlock;
  const int64_t begin = blockIdx.z * p.share;
  const int64_t end = begin + p.share < p.depth ? begin + p.share : p.depth;
  const auto load = [&](int64_t depth) {
    if (depth < end) {
      T* const to = tiles[(depth - begin) / kDepth % 2][0];
      load_operand<kSumFirstA>(to, a, p.a_stride, row0, p.rows, depth, end);
      load_operand<kSumFirstB>(to + kOperand, b, p.b_stride, column0, p.columns, depth, end);
    }
    ptx::cp_async_commit();
  };
  const int warp = threadIdx.x / 32;
  float sums[kBlock / 8][4] = {};
  load(begin);
  for (int64_t depth = begin; depth < end; depth += kDepth) {
    load(depth + kDepth);
    ptx::cp_async_wait<1>();
    __syncthreads();
    const T* const left = tiles[(depth - begin) / kDepth % 2][0];
    const T* const right = left + kOperand;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      FragmentA<T> rows;
      if constexpr (kSumFirstA) {
        load_a_transposed(rows, left + k * kBroad + warp * 16, kBroad);
      } else {
        load_a(rows, left + warp * 16 * kNarrow + k, kNarrow);
      }
      multiply_step<!kSumFirstB, false, true>(sums, rows, right + k * (kSumFirstB ? kBroad : 1),
                                              kSumFirstB ? kBroad : kNarrow);
    }
    __syncthreads();
  }
  Out* const to = c + blockIdx.z * p.rows * p.columns;
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n) {
    const int64_t column = column0 + 8 * n + (lane_id() & 3) * 2;
    if (column >= p.columns) continue;
    float shift[2] = {};
    if (bias != nullptr) {
      shift[0] = to_float(bias[column]);
      shift[1] = to_float(bias[column + 1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row0 + warp * 16 + (lane_id() >> 2) + 8 * i;
      if (row >= p.rows) continue;
      *reinterpret_cast<Pack<Out, 2>*>(to + row * p.columns +
                                       column) = {{from_float<Out>(sums[n][2 * i] + shift[0]),
                                                   from_float<Out>(sums[n][2 * i + 1] + shift[1])}};
    }
  }
}

// parts [grid.y, columns]: sums over a share of the rows.
template <class T>
__global__ void column_sums(const T* rows, int64_t count, int64_t columns, int64_t share,
                            float* parts) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < count ? begin + share : count;
  float sum = 0;
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) sum += to_float(rows[row * columns + column]);
  parts[blockIdx.y * columns + column] = sum;
}

}  // namespace xattn::cpsa_cuda
