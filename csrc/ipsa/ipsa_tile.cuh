// Tiles of 64 tokens between the map, shared memory and the fragments of a warp.
//
// A thread loads half of the row of one token; a warp multiplies and stores 16 rows. Lanes hold
// rows and columns as mma.cuh says: of a tile [16, 8 kN] of products, c[n][e] is row
// lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2.
#pragma once

#include "ipsa_map.cuh"

namespace xattn::ipsa_cuda {

template <int kD>
constexpr int kRowStride = kD + 8;  // keeps ldmatrix free of bank conflicts
template <int kD>
constexpr int kTileSize = kTile * kRowStride<kD>;

XATTN_DEVICE int warp_id() { return threadIdx.x >> 5; }

// The two rows of a lane within its warp's 16, and the first of its columns within 8.
XATTN_DEVICE int lane_row(int half) { return (lane_id() >> 2) + 8 * half; }
XATTN_DEVICE int lane_column() { return 2 * (lane_id() & 3); }

// Among four lanes `kDistance` apart: word i of lane k becomes word k of lane i.
template <int kDistance>
XATTN_DEVICE void transpose_words(uint32_t (&w)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool second = lane_id() & (step * kDistance);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got =
          __shfl_xor_sync(kWholeWarp, second ? w[i] : w[i + step], step * kDistance);
      w[i] = second ? got : w[i];
      w[i + step] = second ? w[i + step] : got;
    }
  }
}

// One thread's share of loading a tile: half of the row of one token, of one head. Half means
// every other piece of 16 bytes, so that two neighbours fill a sector.
template <class T, int kD>
struct RowLoader {
  static constexpr int kPiece = 16 / sizeof(T);
  const Args<T>& a;
  int head;
  const T* qkv;   // the token's q, or that of the padding, or null: zeros; k and v lie behind it
  const T* grad;  // its output gradient, or null: zeros

  XATTN_DEVICE RowLoader(const Args<T>& a, int head) : a(a), head(head) {}

  static XATTN_DEVICE int row() { return threadIdx.x >> 1; }

  XATTN_DEVICE void find(const Window& w, const Place& p) {
    qkv = grad = nullptr;
    if (p.inside) {
      qkv = a.qkv + pixel_offset(a.qkv_stride, w, p) + head * a.head_dim;
    } else if (p.padding && a.pad_qkv) {
      qkv = a.pad_qkv + head * a.head_dim;
    }
    if (p.inside && a.grad_out) {
      grad = a.grad_out + pixel_offset(a.grad_out_stride, w, p) + head * a.head_dim;
    }
  }

  // Channels d0 .. d0 + kD - 1 of q (which = 0), k (1), v (2); zeros beyond the head's.
  XATTN_DEVICE void load_qkv(int which, T* tile, int d0 = 0) const {
    load(qkv ? qkv + which * a.channels() : nullptr, tile, d0);
  }
  XATTN_DEVICE void load_grad(T* tile, int d0 = 0) const { load(grad, tile, d0); }

 private:
  XATTN_DEVICE void load(const T* from, T* tile, int d0) const {
    static_assert(kD % (2 * kPiece) == 0);
    T* to = tile + row() * kRowStride<kD>;
    const int half = threadIdx.x & 1;
    if (a.wide) {
#pragma unroll
      for (int c = 0; c < kD; c += 2 * kPiece) {
        const int d = c + half * kPiece;
        const bool valid = from != nullptr && d0 + d < a.head_dim;
        ptx::cp_async<16>(to + d, valid ? from + d0 + d : a.qkv, valid);
      }
    } else {
      for (int d = half; d < kD; d += 2) {
        to[d] = from != nullptr && d0 + d < a.head_dim ? from[d0 + d] : from_float<T>(0.0f);
      }
    }
  }
};

// c [16, 8 kN] += x y^T over kD channels; x: the warp's 16 rows, y: 8 kN rows.
template <class T, int kD, int kN>
XATTN_DEVICE void multiply_rows(float (&c)[kN][4], const T* x, const T* y) {
  constexpr int kStride = kRowStride<kD>;
#pragma unroll
  for (int d = 0; d < kD; d += 16) {
    FragmentA<T> left;
    load_a(left, x + d, kStride);
#pragma unroll
    for (int n = 0; n + 1 < kN; n += 2) {
      FragmentB<T> right[2];
      load_b_pair(right, y + n * 8 * kStride + d, kStride);
      multiply_add(c[n], left, right[0]);
      multiply_add(c[n + 1], left, right[1]);
    }
    if constexpr (kN % 2 == 1) {
      FragmentB<T> right;
      load_b(right, y + (kN - 1) * 8 * kStride + d, kStride);
      multiply_add(c[kN - 1], left, right);
    }
  }
}

// c [16, kD] += left y; left: rows 16 k .. 16 k + 15 of y as its columns.
template <class T, int kD>
XATTN_DEVICE void multiply_columns(float (&c)[kD / 8][4], const FragmentA<T>& left, const T* y,
                                   int k) {
#pragma unroll
  for (int n = 0; n < kD / 8; n += 2) {
    FragmentB<T> right[2];
    load_b_pair_transposed(right, y + k * 16 * kRowStride<kD> + n * 8, kRowStride<kD>);
    multiply_add(c[n], left, right[0]);
    multiply_add(c[n + 1], left, right[1]);
  }
}

// Columns 16 k .. 16 k + 15 of weights [16, 8 kN], zeros beyond the last.
template <class T, int kN>
XATTN_DEVICE FragmentA<T> weights_as_a(const float (&weights)[kN][4], int k) {
  constexpr float kZeros[4] = {};
  return 2 * k + 1 < kN ? as_a<T>(weights[2 * k], weights[2 * k + 1 < kN ? 2 * k + 1 : 0])
                        : as_a<T>(weights[2 * k], kZeros);
}

// Two neighbouring weights, rounded to T.
template <class T>
XATTN_DEVICE void put_weights(T* to, float first, float second) {
  *reinterpret_cast<Pack<T, 2>*>(to) = {{from_float<T>(first), from_float<T>(second)}};
}

// Stores channels d0 .. d0 + kD - 1 of the lane's rows, times a factor of each row; to[half]: the
// row's channel 0 of the head, or null.
template <class T, int kD>
XATTN_DEVICE void store_rows(const Args<T>& a, const float (&c)[kD / 8][4],
                             const float (&factor)[2], T* const (&to)[2], int d0 = 0) {
  const int left = a.head_dim - d0, column = lane_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float f = factor[half];
    T* row = to[half] ? to[half] + d0 : nullptr;
    if (!a.wide) {
#pragma unroll
      for (int i = 0; i < kD / 4; ++i) {
        const int d = i / 2 * 8 + column + i % 2;
        if (row && d < left) row[d] = from_float<T>(c[i / 2][2 * half + i % 2] * f);
      }
    } else if constexpr (kIsShort<T>) {  // four lanes turn their pairs into pieces of 8 channels
#pragma unroll
      for (int n = 0; n < kD / 8; n += 4) {
        Pack<uint32_t, 4> piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          piece.v[i] = pack_pair<T>(c[n + i][2 * half] * f, c[n + i][2 * half + 1] * f);
        }
        transpose_words<1>(piece.v);
        const int d = n * 8 + 4 * column;
        if (row && d < left) *reinterpret_cast<Pack<uint32_t, 4>*>(row + d) = piece;
      }
    } else {
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        const int d = n * 8 + column;
        if (!row || d >= left) continue;
        *reinterpret_cast<Pack<T, 2>*>(row + d) = {{c[n][2 * half] * f, c[n][2 * half + 1] * f}};
      }
    }
  }
}

}  // namespace xattn::ipsa_cuda
