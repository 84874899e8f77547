// What all CUDA kernels of digest attention share: their arguments, tiles in shared memory, and the
// products of tiles.
//
// A block of 4 warps holds 64 rows (queries or keys) of one image and head, 16 a warp, and meets
// columns (keys or queries) kStep at a time. There are two ways through every kernel:
//   kFast: no dropout, head dimensions up to kWidth whose rows are multiples of 16 bytes, and a
//     relative table that fits into shared memory; columns are loaded while others are computed;
//   else: everything. Head dimensions are taken in chunks of kWidth channels: products over
//     channels add up the chunks, and a block of its own computes each chunk of a result.
#pragma once

#include "common/mma.cuh"
#include "common/philox.cuh"

namespace xattn::digest_cuda {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;
constexpr int kStep = 32, kStepTiles = kStep / 8;
constexpr float kLowest = -3e38f;  // below every logit; its differences to itself are finite

// One call; memory layouts as in DigestArgs (digest.h).
struct Args {
  int64_t batch;
  int tokens, digests, heads, head_dim;
  int grid_w, grid_h, prefix;
  int chunks;   // of the head dimension; 1 on the fast way
  bool vector;  // rows of a head are multiples of 16 bytes, everywhere

  const void* qkv;
  int64_t qkv_stride[2];
  const void* digest_kv;
  int64_t digest_stride[2];
  const void *bias_table, *digest_bias;
  float scale;
  Dropout dropout;

  void* out;
  float* row_stats;  // [batch, heads, tokens, 2]: largest logit, reciprocal of the weights' sum

  // Backward only.
  const void* grad_out;
  int64_t grad_out_stride[2];
  void *grad_qkv, *grad_digest_kv;
  float* deltas;        // [batch, heads, tokens]: sum over a row of weights times their gradients
  float* digest_parts;  // [batch, heads, digests], or null
  float* table_parts;   // [shares * query_groups, heads, grid_h * grid_w]
  int shares, query_groups;

  XATTN_DEVICE int channels() const { return heads * head_dim; }
  XATTN_DEVICE int keys() const { return tokens + digests; }
};

XATTN_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The tile of rows of a block: heads fastest, then tiles, then images.
struct Block {
  int64_t image;
  int head, tile;
  XATTN_DEVICE Block(const Args& a, int tiles)
      : image(blockIdx.x / (a.heads * tiles)),
        head(blockIdx.x % a.heads),
        tile(blockIdx.x / a.heads % tiles) {}
  XATTN_DEVICE int64_t unit(const Args& a) const { return image * a.heads + head; }
};

template <class T, int kWidth_, bool kFast_>
struct Layout {
  using Value = T;
  static constexpr bool kFast = kFast_;
  static constexpr int kWidth = kWidth_, kStride = kWidth + 8;
  static constexpr int kTiles = kWidth / 8;                           // of a product's result
  static constexpr int kColumns = kFast && kIsShort<T> ? 64 : kStep;  // loaded at once
  static constexpr int kStages = kFast ? 2 : 1;
  // Of a multiprocessor, which leave a thread 128, 168 or 255 registers.
  static constexpr int kBlocks = !kFast || !kIsShort<T> ? 2 : kWidth == 32 ? 4 : 3;
  static_assert(kWidth % 16 == 0 && kColumns % kStep == 0);
};

// `count` rows of one matrix, of which `columns` channels are meant.
template <class T>
struct Rows {
  const T* from;
  int64_t stride;
  int count, columns;
  XATTN_DEVICE Rows chunk(int c, int width) const {
    return {from + c * width, stride, count, min(columns - c * width, width)};
  }
};

// Rows into s [kCount][kStride], zeros around them. The caller commits, waits and synchronises.
template <class L, int kCount, class T>
XATTN_DEVICE void load_rows(T* s, const Rows<T>& rows, bool vector) {
  if (L::kFast || vector) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = L::kWidth / kPiece;
    for (int i = threadIdx.x; i < kCount * kPieces; i += kThreads) {
      const int row = i / kPieces, column = i % kPieces * kPiece;
      const bool there = row < rows.count && column < rows.columns;
      ptx::cp_async<16>(s + row * L::kStride + column,
                        there ? rows.from + row * rows.stride + column : rows.from, there);
    }
  } else {
    for (int i = threadIdx.x; i < kCount * L::kWidth; i += kThreads) {
      const int row = i / L::kWidth, column = i % L::kWidth;
      const bool there = row < rows.count && column < rows.columns;
      s[row * L::kStride + column] =
          there ? rows.from[row * rows.stride + column] : from_float<T>(0);
    }
  }
}

// The 16 rows of this warp in s [kRows][kStride] as the left side of products.
template <class L, class T>
XATTN_DEVICE void load_left(FragmentA<T> (&a)[L::kWidth / 16], const T* s) {
#pragma unroll
  for (int k = 0; k < L::kWidth / 16; ++k) {
    load_a(a[k], s + threadIdx.x / 32 * 16 * L::kStride + k * 16, L::kStride);
  }
}

// c [16, kStep] += a b^T, summed over channels.
template <class L, class T>
XATTN_DEVICE void multiply_channels(float (&c)[kStepTiles][4],
                                    const FragmentA<T> (&a)[L::kWidth / 16], const T* b) {
#pragma unroll
  for (int k = 0; k < L::kWidth / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kStepTiles; n += 2) {
      FragmentB<T> pair[2];
      load_b_pair(pair, b + n * 8 * L::kStride + k * 16, L::kStride);
      multiply_add(c[n], a[k], pair[0]);
      multiply_add(c[n + 1], a[k], pair[1]);
    }
  }
}

// c [16, kWidth] += weights [16, kStep] b [kStep, kWidth].
template <class L, class T>
XATTN_DEVICE void multiply_weights(float (&c)[L::kTiles][4], const float (&weights)[kStepTiles][4],
                                   const T* b) {
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
    const FragmentA<T> a = as_a<T>(weights[2 * k], weights[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < L::kTiles; n += 2) {
      FragmentB<T> pair[2];
      load_b_pair_transposed(pair, b + k * 16 * L::kStride + n * 8, L::kStride);
      multiply_add(c[n], a, pair[0]);
      multiply_add(c[n + 1], a, pair[1]);
    }
  }
}

template <int kCount>
XATTN_DEVICE void clear(float (&c)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
  }
}

// c [16, kWidth] of this warp to rows of `to`, times the factor of each of the lane's two rows;
// through s, its own 16 rows of shared memory.
template <class L, class T>
XATTN_DEVICE void store_rows(const float (&c)[L::kTiles][4], const float (&factor)[2], T* s, T* to,
                             int64_t stride, int count, int columns, bool vector) {
  const int l = lane_id(), first = threadIdx.x / 32 * 16;
  s += first * L::kStride;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < L::kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = c[n][2 * half] * factor[half], y = c[n][2 * half + 1] * factor[half];
      *reinterpret_cast<Pack<T, 2>*>(s + (l / 4 + 8 * half) * L::kStride + n * 8 +
                                     l % 4 * 2) = {{from_float<T>(x), from_float<T>(y)}};
    }
  }
  __syncwarp();
  if (L::kFast || vector) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = L::kWidth / kPiece;
#pragma unroll
    for (int i = l; i < 16 * kPieces; i += 32) {
      const int row = i / kPieces, column = i % kPieces * kPiece;
      if (first + row >= count || column >= columns) continue;
      *reinterpret_cast<Pack<T, kPiece>*>(to + (first + row) * stride + column) =
          *reinterpret_cast<const Pack<T, kPiece>*>(s + row * L::kStride + column);
    }
  } else {
    for (int i = l; i < 16 * L::kWidth; i += 32) {
      const int row = i / L::kWidth, column = i % L::kWidth;
      if (first + row >= count || column >= columns) continue;
      to[(first + row) * stride + column] = s[row * L::kStride + column];
    }
  }
}

// Matrices of an image and head. Those of keys begin with key `first`, of the tokens or digests.
template <class T>
struct Image {
  const Args& a;
  int64_t image;
  int head;
  XATTN_DEVICE int channel() const { return head * a.head_dim; }
  XATTN_DEVICE Rows<T> queries(int first) const {
    const T* base = static_cast<const T*>(a.qkv) + image * a.qkv_stride[0] + channel();
    return {base + first * a.qkv_stride[1], a.qkv_stride[1], a.tokens - first, a.head_dim};
  }
  XATTN_DEVICE Rows<T> grads(int first) const {
    const T* base = static_cast<const T*>(a.grad_out) + image * a.grad_out_stride[0] + channel();
    return {base + first * a.grad_out_stride[1], a.grad_out_stride[1], a.tokens - first,
            a.head_dim};
  }
  // which: 0 for keys, 1 for values.
  XATTN_DEVICE Rows<T> keys(int which, bool digests, int first) const {
    if (digests) {
      const T* base = static_cast<const T*>(a.digest_kv) + image * a.digest_stride[0];
      return {base + first * a.digest_stride[1] + which * a.channels() + channel(),
              a.digest_stride[1], a.digests - first, a.head_dim};
    }
    Rows<T> rows = queries(first);
    rows.from += (1 + which) * a.channels();
    return rows;
  }
};

// Both products over channels of 64 rows with kStep columns, where channels come in chunks:
// c[i] = left[i] right[i]^T, through rows[i] and columns[i] in shared memory.
template <class L, int kProducts, class T>
XATTN_DEVICE void multiply_chunks(float (&c)[kProducts][kStepTiles][4],
                                  const Rows<T> (&left)[kProducts],
                                  const Rows<T> (&right)[kProducts],
                                  T (&rows)[kProducts][kRows * L::kStride],
                                  T (*columns)[L::kColumns * L::kStride], const Args& a) {
#pragma unroll
  for (int i = 0; i < kProducts; ++i) clear(c[i]);
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      load_rows<L, kRows>(rows[i], left[i].chunk(chunk, L::kWidth), a.vector);
      load_rows<L, L::kColumns>(columns[i], right[i].chunk(chunk, L::kWidth), a.vector);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      FragmentA<T> fragments[L::kWidth / 16];
      load_left<L>(fragments, rows[i]);
      multiply_channels<L>(c[i], fragments, columns[i]);
    }
  }
}

}  // namespace xattn::digest_cuda
