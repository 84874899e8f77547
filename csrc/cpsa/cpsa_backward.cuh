// Backward of cross-patch attention on CUDA, absorbed form, of up to 64 tokens of a channel.
//
// With Y = X A + a, W = softmax2(Y X^T) and dO the gradient of the result:
//   dZ = dO B^T     dW = dZ X^T     dS = ln2 W (dW - rowsum(W dW))     dY = dS X     U = W^T dO
//   dX = dS^T Y + dY A^T + U B^T     dA = X^T dY     da = sum dY     dB = X^T U     db = sum U
// (the rows of W add up to 1). Of a single token W is 1 and dS is 0.
//
// X and dO of a vector of channels are in shared memory, and dX takes the place of dO. Few of these
// channels at a time also have Y, W and dS there: in flight, a warp for each 16 of their rows.
#pragma once

#include "cpsa_forward.cuh"

namespace xattn::cpsa_cuda {

template <class T>
struct BackwardCall {
  Geometry map;
  Map<const T> x, grad_out;
  Map<T> grad_x;
  Absorbed<T> weights;  // result_bias is not used
  float* sums;          // [blocks, 2, kColumns + 1, kColumns]: dA and below it da, dB and db
  int items;            // that the blocks share out
  int groups;           // of channels
  int slots_log2;       // few tokens: rows of a channel
  int channels;         // many tokens: that are loaded at once, a vector or half of one
  int in_flight;        // and how many of these are worked on at a time
};

constexpr int kSums = 2 * (kMatrix + kColumns);

// kFew: tiles of 16 rows, each of 16 / slots channels, all in flight; else 64 rows of one channel.
template <class T, bool kFew>
struct BackwardTile {
  static constexpr int kRows = kFew ? 16 : 64;
  static constexpr int kTilesOfRows = kRows / 16;
  static constexpr int kScores = kFew ? 24 : 72;  // a row of W or dS, free of bank conflicts
  // W and dS of a matrix, later U.
  static constexpr int kScratch =
      2 * kRows * kScores > kRows* kColumns ? 2 * kRows * kScores : kRows * kColumns;

  // matrices: in shared memory; in_flight of them at a time.
  static int64_t bytes(int64_t matrices, int64_t in_flight) {
    const int64_t rows = 2 * matrices * kRows * kColumns;
    return SharedWeights<T>::kBytes +
           (rows + in_flight * (kRows * kColumns + kScratch)) * int64_t{sizeof(T)};
  }
};

// Where a warp finds its matrix.
template <class T>
struct MatrixInFlight {
  T *x, *grad_out;  // [rows, kColumns]; the gradient of x takes the place of grad_out
  T* y;             // [rows, kColumns], later dY
  T* scores;        // W and behind it dS, [rows, kScores] each, later U [rows, kColumns]
};

// Sums over the rows of all matrices in flight: of each half (dA, dB) a warp keeps 16 rows.
template <class T>
struct WeightSums {
  static constexpr int kHalves = 8 / kWarps<T>;  // that a warp adds to
  static_assert(kWarps<T> == 4 || kWarps<T> == 8);
  float c[kHalves][kTiles][4];

  XATTN_DEVICE WeightSums() : c{} {}

  // left [rows, kColumns]: X; right: dY or U.
  XATTN_DEVICE void add(int half, const T* left, const T* right) {
    const int first = warp_id() % 4 * 16, l = lane_id();
    FragmentA<T> a;
    if (first + 16 <= kColumns) {
      load_a_transposed(a, left + first, kColumns);
    } else {
      // The last columns of X, and ones: their products are the sums over the rows.
      if constexpr (kIsShort<T>) {
        uint32_t r[2];
        ptx::ldmatrix<2, true>(r, left + first + (l & 15) * kColumns);
        a.pairs[0] = r[0];
        a.pairs[2] = r[1];
        a.pairs[1] = a.pairs[3] = pack_pair<T>(1, 1);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int row = (l & 3) * 2 + j + (i >> 1) * 8;
            a.pairs[i][j] = i % 2 == 0 ? left[first + row * kColumns + (l >> 2)] : 1.0f;
          }
        }
      }
    }
    multiply_step<false, false>(c[half], a, right, kColumns);
  }

  // to [2, kColumns + 1, kColumns].
  XATTN_DEVICE void store(float* to) const {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      float* const half = to + (kHalves == 2 ? h : warp_id() / 4) * (kMatrix + kColumns);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = warp_id() % 4 * 16 + (lane_id() >> 2) + (j >> 1) * 8;
          const int column = 8 * n + (lane_id() & 3) * 2 + (j & 1);
          if (row <= kColumns) half[row * kColumns + column] = c[h][n][j];
        }
      }
    }
  }
};

// Stores a tile [16, 8 kCount] of scores.
template <class T, int kCount>
XATTN_DEVICE void store_scores(T* to, int stride, const float (&s)[kCount][4]) {
  to += (lane_id() >> 2) * stride + (lane_id() & 3) * 2;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    *reinterpret_cast<Pack<T, 2>*>(to + 8 * n) = {{from_float<T>(s[n][0]), from_float<T>(s[n][1])}};
    *reinterpret_cast<Pack<T, 2>*>(to + 8 * stride +
                                   8 * n) = {{from_float<T>(s[n][2]), from_float<T>(s[n][3])}};
  }
}

// Rows of logits in base 2 become weights. seen: whether s[n][j] counts.
template <int kCount, class Seen>
XATTN_DEVICE void softmax_rows(float (&s)[kCount][4], Seen seen) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; ++j) {
        if (!seen(n, j)) s[n][j] = -INFINITY;
        top = fmaxf(top, s[n][j]);
      }
    }
    top = quad_max(top);
    float total = 0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; ++j) total += s[n][j] = ptx::exp2(s[n][j] - top);
    }
    const float factor = 1 / quad_sum(total);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; ++j) s[n][j] *= factor;
    }
  }
}

// dW, of weights w, becomes dS.
template <int kCount>
XATTN_DEVICE void softmax_gradient(float (&dw)[kCount][4], const float (&w)[kCount][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; ++j) sum += w[n][j] * dw[n][j];
    }
    sum = quad_sum(sum);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; ++j) dw[n][j] = kLn2 * w[n][j] * (dw[n][j] - sum);
    }
  }
}

// Of 16 queries: leaves Y, W and dS in memory, returns dY.
template <class T, bool kFew>
XATTN_DEVICE Rows<T> query_gradients(const MatrixInFlight<T>& m, const SharedWeights<T>& weights,
                                     int tile, int tokens, unsigned seen) {
  using Tile = BackwardTile<T, kFew>;
  constexpr int kCount = Tile::kRows / 8;
  const int first = tile * 16 * kColumns;
  float c[kTiles][4];
  Rows<T> rows;
  rows.load(m.x + first);
  set_rows(c, weights.query_bias);
  multiply<false>(c, rows, weights.query);
  rows.set(c);
  rows.store(m.y + first);
  float w[kCount][4] = {};
  multiply<true>(w, rows, m.x);
  softmax_rows(w, [&](int n, int j) {
    return kFew ? seen >> (4 * n + j) & 1 : 8 * n + (lane_id() & 3) * 2 + (j & 1) < tokens;
  });
  T* const to = m.scores + tile * 16 * Tile::kScores;
  store_scores(to, Tile::kScores, w);

  rows.load(m.grad_out + first);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
  multiply<true>(c, rows, weights.result);
  rows.set(c);  // dZ
  float ds[kCount][4] = {};
  multiply<true>(ds, rows, m.x);
  softmax_gradient(ds, w);
  store_scores(to + Tile::kRows * Tile::kScores, Tile::kScores, ds);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
#pragma unroll
  for (int k = 0; k < kCount / 2; ++k) {
    multiply_step<false, false>(c, as_a<T>(ds[2 * k], ds[2 * k + 1]), m.x + 16 * k * kColumns,
                                kColumns);
  }
  rows.set(c);
  return rows;
}

// c [16, kColumns] of 16 keys += scores^T rows, over all queries. scores [rows, kScores].
template <class T, bool kFew>
XATTN_DEVICE void add_over_queries(float (&c)[kTiles][4], const T* scores, const T* rows,
                                   int tile) {
  using Tile = BackwardTile<T, kFew>;
#pragma unroll 1
  for (int q = 0; q < Tile::kTilesOfRows; ++q) {
    FragmentA<T> a;
    load_a_transposed(a, scores + 16 * (q * Tile::kScores + tile), Tile::kScores);
    multiply_step<false, false>(c, a, rows + 16 * q * kColumns, kColumns);
  }
}

// Until all warps of a matrix are here: of few tokens that is one.
template <bool kFew>
XATTN_DEVICE void sync_matrix() {
  if constexpr (kFew) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The gradient of x of the matrix in place of that of the result; dY in place of Y, U in place of
// W. Every warp of the block calls this; the ones that are not `busy` only wait.
template <class T, bool kFew>
XATTN_DEVICE void matrix_gradients(const MatrixInFlight<T>& m, const SharedWeights<T>& weights,
                                   int tile, int tokens, unsigned seen, bool busy) {
  using Tile = BackwardTile<T, kFew>;
  const int first = tile * 16 * kColumns;
  const bool attends = tokens > 1;
  float dx[kTiles][4] = {};
  Rows<T> dy, u;
  if (attends && busy) dy = query_gradients<T, kFew>(m, weights, tile, tokens, seen);
  sync_matrix<kFew>();
  if (busy && attends) {
    float c[kTiles][4] = {};
    add_over_queries<T, kFew>(c, m.scores, m.grad_out, tile);
    u.set(c);
    add_over_queries<T, kFew>(dx, m.scores + Tile::kRows * Tile::kScores, m.y, tile);
  } else if (busy) {
    u.load(m.grad_out + first);
  }
  sync_matrix<kFew>();
  if (!busy) return;
  u.store(m.scores + first);
  multiply<true>(dx, u, weights.result);
  if (attends) {
    dy.store(m.y + first);
    multiply<true>(dx, dy, weights.query);
  }
  u.set(dx);
  u.store(m.grad_out + first);
}

// Between a map and planes, of whole vectors of channels or of half a vector.
template <class T>
XATTN_DEVICE void load_channels(const BackwardCall<T>& call, const Map<const T>& map, int64_t image,
                                int channel, int vectors_log2, int slots, T* planes) {
  if (call.channels == kVector<T>) {
    load_planes<kVector<T>>(call.map, map, image, channel, vectors_log2, 0, slots, planes);
  } else {
    load_planes<kVector<T> / 2>(call.map, map, image, channel, vectors_log2, 0, slots, planes);
  }
}
template <class T>
XATTN_DEVICE void store_channels(const BackwardCall<T>& call, int64_t image, int channel,
                                 int vectors_log2, int slots, const T* planes) {
  if (call.channels == kVector<T>) {
    store_planes<kVector<T>>(call.map, call.grad_x, image, channel, vectors_log2, 0, slots, planes);
  } else {
    store_planes<kVector<T> / 2>(call.map, call.grad_x, image, channel, vectors_log2, 0, slots,
                                 planes);
  }
}

template <class T, bool kFew>
__global__ void __launch_bounds__(kWarps<T> * 32, kFew ? 2 : 1) backward(BackwardCall<T> call) {
  using Tile = BackwardTile<T, kFew>;
  SHARED_DYNAMIC(unsigned char, memory);
  const Geometry& g = call.map;
  const bool attends = g.tokens > 1;
  const SharedWeights<T> weights(memory);
  weights.load(call.weights, attends);
  // Few: a block has a tile for each warp, and all of them are in flight.
  const int matrices = kFew ? kWarps<T> : call.channels;
  const int in_flight = kFew ? kWarps<T> : call.in_flight;
  const int slots = kFew ? 1 << call.slots_log2 : Tile::kRows;
  const int vectors_log2 = kFew ? 4 - call.slots_log2 : 0;
  const int channels = kFew ? matrices * 16 / slots : call.channels;
  T* const x = weights.rest();
  T* const grads = x + matrices * Tile::kRows * kColumns;
  T* const ys = grads + matrices * Tile::kRows * kColumns;
  T* const scores = ys + in_flight * Tile::kRows * kColumns;
  const int flight = warp_id() / Tile::kTilesOfRows, tile = warp_id() % Tile::kTilesOfRows;
  const unsigned seen = kFew ? keys_seen(g.tokens, call.slots_log2) : 0;
  WeightSums<T> sums;

  for (int item = blockIdx.x; item < call.items; item += gridDim.x) {
    const int image = item / call.groups, channel = item % call.groups * channels;
    load_channels(call, call.x, image, channel, vectors_log2, slots, x);
    load_channels(call, call.grad_out, image, channel, vectors_log2, slots, grads);
    __syncthreads();
    // Matrices without a channel are zeros throughout.
    const int left = (g.channels - channel) * slots;  // rows
    const int whole = min(matrices, (left + Tile::kRows - 1) / Tile::kRows);
    for (int first = 0; first < whole; first += in_flight) {
      const int count = min(in_flight, whole - first);
      const bool busy = flight < count;
      const int at = (first + flight) * Tile::kRows * kColumns;
      const MatrixInFlight<T> matrix{x + at, grads + at, ys + flight * Tile::kRows * kColumns,
                                     scores + flight * Tile::kScratch};
      matrix_gradients<T, kFew>(matrix, weights, tile, g.tokens, seen, busy);
      __syncthreads();
      for (int row = 0; row < count * Tile::kRows; row += 16) {
        const T* const rows = x + (first * Tile::kRows + row) * kColumns;
        const T* const u =
            scores + row / Tile::kRows * Tile::kScratch + row % Tile::kRows * kColumns;
        const bool second = warp_id() >= 4;
        if (attends && !second) sums.add(0, rows, ys + row * kColumns);
        if (second || WeightSums<T>::kHalves == 2) sums.add(WeightSums<T>::kHalves - 1, rows, u);
      }
      __syncthreads();
    }
    store_channels(call, image, channel, vectors_log2, slots, grads);
    __syncthreads();
  }
  sums.store(call.sums + int64_t{blockIdx.x} * kSums);
}

}  // namespace xattn::cpsa_cuda
