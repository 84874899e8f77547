// Products of small matrices, c = alpha a b + bias, for each entry of a batch, several products in
// one launch: what operators need around their kernels where a matrix library would cost more in
// launches than in arithmetic.
//
// A block forms 32 x 32 values. Its four warps share the sum over k: each takes every fourth step
// of 16, and their sums are added in a fixed order. So even few rows make enough work for a warp,
// and every value depends on the sizes alone, never on the card.
#pragma once

#include <initializer_list>

#include "mma.cuh"

namespace xattn {

// Element (row, column) of entry i of the batch stands at
// data[i * batch_stride + row * row_stride + column * column_stride].
struct MatmulOperand {
  const void* data;
  int64_t batch_stride, row_stride, column_stride;
  bool wide;  // float, whatever the storage type is
};

struct SmallMatmul {
  int64_t batch;
  int m, n, k;
  MatmulOperand a, b;  // [m, k], [k, n]
  struct {
    void* data;  // rows are dense
    int64_t batch_stride, row_stride;
    bool wide;
  } c;
  float alpha = 1;
  struct {
    const void* data = nullptr;  // [n] of each entry, of the storage type, or null
    int64_t batch_stride = 0;
    const float* factors = nullptr;  // of each row, or null: 1
    int64_t factors_batch_stride = 0, factors_row_stride = 0;
  } bias;
};

namespace small_matmul {

constexpr int kEdge = 32;  // rows and columns of a block's result
constexpr int kWarps = 4, kThreads = 32 * kWarps;

// A block's part of an operand: kEdge lines (rows of a, columns of b), kDepth steps of k. In shared
// memory either lines are rows or, where lines are neighbours in global memory, steps are.
template <class T>
struct Tile {
  static constexpr int kPiece = 16 / sizeof(T);  // values of one access
  static constexpr int kDepth = 16 * kPiece;
  static constexpr int kPieces = kEdge * kDepth / kPiece / kThreads;  // of a thread
  static constexpr int kLineStride = kDepth + 8;
  static constexpr int kStepStride = kEdge + (kIsShort<T> ? 8 : 4);
  static constexpr int kSize =
      kEdge * kLineStride > kDepth* kStepStride ? kEdge * kLineStride : kDepth * kStepStride;
  Pack<T, kPiece> pieces[kPieces];
};

constexpr int kSumStride = kEdge + 8;  // of the warps' sums
constexpr int kSumBytes = kWarps * kEdge * kSumStride * sizeof(float);

// An operand as lines and steps.
struct Side {
  const void* data;
  int64_t batch_stride, line_stride, step_stride;
  int lines;
  bool wide, by_step;  // by_step: lines are neighbours
  bool vector;         // pieces may be loaded as one
};

// A product as kernels see it, and those of a launch: product i has blocks begin[i] .. begin[i +
// 1].
struct Product {
  SmallMatmul sizes;
  Side a, b;
};
constexpr int kMostProducts = 4;
struct Products {
  unsigned begin[kMostProducts + 1];
  Product all[kMostProducts];
};

template <class T, class Source>
XATTN_DEVICE Pack<T, Tile<T>::kPiece> load_piece(const Source* from, int64_t stride, int count,
                                                 bool vector) {
  constexpr int kPiece = Tile<T>::kPiece, kLoad = 16 / sizeof(Source);
  Pack<T, kPiece> piece;
  if (vector && count >= kPiece) {
#pragma unroll
    for (int i = 0; i < kPiece; i += kLoad) {
      const auto load = *reinterpret_cast<const Pack<Source, kLoad>*>(from + i);
#pragma unroll
      for (int j = 0; j < kLoad; ++j) piece.v[i + j] = from_float<T>(to_float(load.v[j]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      piece.v[i] = from_float<T>(i < count ? to_float(from[i * stride]) : 0.0f);
    }
  }
  return piece;
}

// Where piece i of this thread stands in the tile.
template <class T>
XATTN_DEVICE void place_of(int i, bool by_step, int& line, int& step) {
  constexpr int kPiece = Tile<T>::kPiece, kOfStep = kEdge / kPiece;
  const int place = threadIdx.x + i * kThreads;
  line = by_step ? place % kOfStep * kPiece : place / (Tile<T>::kDepth / kPiece);
  step = by_step ? place / kOfStep : place % (Tile<T>::kDepth / kPiece) * kPiece;
}

// data: of the entry of the batch.
template <class T, class Source>
XATTN_DEVICE void load_pieces(Tile<T>& tile, const Side& side, const Source* data, int first_line,
                              int first_step, int steps) {
  const int64_t stride = side.by_step ? side.line_stride : side.step_stride;
#pragma unroll
  for (int i = 0; i < Tile<T>::kPieces; ++i) {
    int line, step;
    place_of<T>(i, side.by_step, line, step);
    line += first_line;
    step += first_step;
    const bool inside = line < side.lines && step < steps;
    const int count = !inside ? 0 : side.by_step ? side.lines - line : steps - step;
    tile.pieces[i] = load_piece<T>(data + line * side.line_stride + step * side.step_stride, stride,
                                   count, side.vector);
  }
}

template <class T>
XATTN_DEVICE void load_tile(Tile<T>& tile, const Side& side, int64_t entry, int first_line,
                            int first_step, int steps) {
  const int64_t at = entry * side.batch_stride;
  if (side.wide) {
    load_pieces(tile, side, static_cast<const float*>(side.data) + at, first_line, first_step,
                steps);
  } else {
    load_pieces(tile, side, static_cast<const T*>(side.data) + at, first_line, first_step, steps);
  }
}

template <class T>
XATTN_DEVICE void store_tile(const Tile<T>& tile, T* shared, bool by_step) {
#pragma unroll
  for (int i = 0; i < Tile<T>::kPieces; ++i) {
    int line, step;
    place_of<T>(i, by_step, line, step);
    T* to = shared +
            (by_step ? step * Tile<T>::kStepStride + line : line * Tile<T>::kLineStride + step);
    *reinterpret_cast<Pack<T, Tile<T>::kPiece>*>(to) = tile.pieces[i];
  }
}

// sums [2 x 16 rows][4 x 8 columns] += steps `step` .. step + 15 of the tiles.
template <class T>
XATTN_DEVICE void multiply_step(float (&sums)[2][4][4], const T* a, bool a_by_step, const T* b,
                                bool b_by_step, int step) {
  constexpr int kLine = Tile<T>::kLineStride, kStep = Tile<T>::kStepStride;
  FragmentA<T> left[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (a_by_step) {
      load_a_transposed(left[i], a + step * kStep + i * 16, kStep);
    } else {
      load_a(left[i], a + i * 16 * kLine + step, kLine);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    FragmentB<T> right[2];
    if (b_by_step) {
      load_b_pair_transposed(right, b + step * kStep + j * 8, kStep);
    } else {
      load_b_pair(right, b + j * 8 * kLine + step, kLine);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multiply_add(sums[i][j], left[i], right[0]);
      multiply_add(sums[i][j + 1], left[i], right[1]);
    }
  }
}

// The warps' sums in their order, then alpha and bias: a thread has one column of the block.
template <class T>
XATTN_DEVICE void finish(const SmallMatmul& p, const float* sums, int64_t entry, int row,
                         int column) {
  const int at = threadIdx.x % kEdge;
  column += at;
  if (column >= p.n) return;
  float bias = 0;
  if (p.bias.data) {
    bias = to_float(static_cast<const T*>(p.bias.data)[entry * p.bias.batch_stride + column]);
  }
  for (int r = threadIdx.x / kEdge; r < kEdge && row + r < p.m; r += kThreads / kEdge) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[(w * kEdge + r) * kSumStride + at];
    float value = bias;
    if (p.bias.factors) {
      value *=
          p.bias
              .factors[entry * p.bias.factors_batch_stride + (row + r) * p.bias.factors_row_stride];
    }
    value += p.alpha * sum;
    const int64_t to = entry * p.c.batch_stride + (row + r) * p.c.row_stride + column;
    if (p.c.wide) {
      static_cast<float*>(p.c.data)[to] = value;
    } else {
      static_cast<T*>(p.c.data)[to] = from_float<T>(value);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) multiply(const __grid_constant__ Products products) {
  constexpr int kDepth = Tile<T>::kDepth, kTileBytes = 2 * Tile<T>::kSize * sizeof(T);
  SHARED(unsigned char, memory, [kTileBytes > kSumBytes ? kTileBytes : kSumBytes]);
  T *a = reinterpret_cast<T*>(memory), *b = a + Tile<T>::kSize;
  int which = 0;
  while (blockIdx.x >= products.begin[which + 1]) ++which;
  const Product& product = products.all[which];
  const SmallMatmul& p = product.sizes;
  const Side &left = product.a, &right = product.b;

  const int warp = threadIdx.x / 32, block = blockIdx.x - products.begin[which];
  const int columns = (p.n + kEdge - 1) / kEdge, rows = (p.m + kEdge - 1) / kEdge;
  const int column = block % columns * kEdge, row = block / columns % rows * kEdge;
  const int64_t entry = block / columns / rows;

  float sums[2][4][4] = {};
  Tile<T> next_a, next_b;
  load_tile(next_a, left, entry, row, 0, p.k);
  load_tile(next_b, right, entry, column, 0, p.k);
  for (int first = 0; first < p.k; first += kDepth) {
    if (first > 0) __syncthreads();  // all have read the tiles before
    store_tile(next_a, a, left.by_step);
    store_tile(next_b, b, right.by_step);
    __syncthreads();
    if (first + kDepth < p.k) {
      load_tile(next_a, left, entry, row, first + kDepth, p.k);
      load_tile(next_b, right, entry, column, first + kDepth, p.k);
    }
    for (int step = warp * 16; step < kDepth && first + step < p.k; step += kWarps * 16) {
      multiply_step(sums, a, left.by_step, b, right.by_step, step);
    }
  }
  __syncthreads();

  float* all = reinterpret_cast<float*>(memory);
  const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // pairs: rows g and g + 8 of 2 x 4 tiles
    const int tile = i / 2, at = (warp * kEdge + tile / 4 * 16 + i % 2 * 8 + g) * kSumStride;
    const float* pair = sums[tile / 4][tile % 4] + i % 2 * 2;
    *reinterpret_cast<Pack<float, 2>*>(all + at + tile % 4 * 8 + c) = {{pair[0], pair[1]}};
  }
  __syncthreads();
  finish<T>(p, all, entry, row, column);
}

template <class T>
Side side_of(const MatmulOperand& x, int lines, int64_t line_stride, int64_t step_stride) {
  Side side{x.data, x.batch_stride, line_stride, step_stride, lines, x.wide, false, false};
  side.by_step = line_stride == 1 && step_stride != 1;
  const int64_t each = 16 / (x.wide ? sizeof(float) : sizeof(T));
  const int64_t dense = side.by_step ? line_stride : step_stride;
  const int64_t other = side.by_step ? step_stride : line_stride;
  side.vector = dense == 1 && other % each == 0 && x.batch_stride % each == 0 &&
                reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  return side;
}

}  // namespace small_matmul

// At most kMostProducts of them. Call: has launch(kernel, grid, threads, shared bytes, arguments
// ...), as CudaCall.
template <class T, class Call>
void multiply_small(Call& call, std::initializer_list<SmallMatmul> products) {
  namespace s = small_matmul;
  s::Products launched{};
  int count = 0;
  for (const SmallMatmul& p : products) {
    const int64_t tiles = ((p.m + int64_t{s::kEdge} - 1) / s::kEdge) *
                          ((p.n + int64_t{s::kEdge} - 1) / s::kEdge) * p.batch;
    launched.all[count] = {p, s::side_of<T>(p.a, p.m, p.a.row_stride, p.a.column_stride),
                           s::side_of<T>(p.b, p.n, p.b.column_stride, p.b.row_stride)};
    launched.begin[count + 1] = launched.begin[count] + static_cast<unsigned>(tiles);
    ++count;
  }
  call.launch(s::multiply<T>, dim3(launched.begin[count]), s::kThreads, size_t{0}, launched);
}

}  // namespace xattn
