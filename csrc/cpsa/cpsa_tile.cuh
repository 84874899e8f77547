// Tiles of tokens in shared memory, for the absorbed form of cross-patch attention on CUDA, and
// their products.
//
// A row is a token, filled up with zeros to kColumns. Rows of 56 elements keep ldmatrix free of
// bank conflicts; the last of their four steps of 16 columns is a half one.
#pragma once

#include "common/mma.cuh"
#include "cpsa_map.cuh"

namespace xattn::cpsa_cuda {

constexpr int kColumns = 56;          // of a row: the pixels of a patch and zeros
constexpr int kTiles = kColumns / 8;  // of a product's columns
constexpr int kSteps = (kColumns + 15) / 16;
constexpr int kMatrix = kColumns * kColumns;  // elements of A or B
static_assert(kColumns % 16 == 8, "the last step is a half one");

template <class T>
constexpr int kWarps = kVector<T>;  // of a block: one for each channel that 16 bytes hold

XATTN_DEVICE int warp_id() { return threadIdx.x >> 5; }

// Tokens [first, first + slots) of `kChannels << vectors_log2` channels from the map, by the whole
// block: planes [channels, slots, kColumns], every element of which is written.
template <int kChannels, class T>
XATTN_DEVICE void load_planes(const Geometry& g, const Map<const T>& map, int64_t image,
                              int channel, int vectors_log2, int first, int slots, T* planes) {
  const int pair = lane_id(), warps = blockDim.x >> 5;
  if (pair >= kColumns / 2) return;
#pragma unroll 2
  for (int row = warp_id(); row < slots << vectors_log2; row += warps) {
    const int vector = row & ((1 << vectors_log2) - 1), slot = row >> vectors_log2;
    const auto values =
        read_pair<kChannels>(g, map, image, channel + vector * kChannels, first + slot, pair);
    pair_to_rows(values, planes + (vector * kChannels * slots + slot) * kColumns + 2 * pair,
                 slots * kColumns);
  }
}

// And back, what lies inside.
template <int kChannels, class T>
XATTN_DEVICE void store_planes(const Geometry& g, const Map<T>& map, int64_t image, int channel,
                               int vectors_log2, int first, int slots, const T* planes) {
  const int pair = lane_id(), warps = blockDim.x >> 5;
  if (2 * pair >= g.pixels) return;
  for (int row = warp_id(); row < slots << vectors_log2; row += warps) {
    const int vector = row & ((1 << vectors_log2) - 1), slot = row >> vectors_log2;
    const auto values = pair_from_rows<kChannels>(
        planes + (vector * kChannels * slots + slot) * kColumns + 2 * pair, slots * kColumns);
    write_pair(g, map, image, channel + vector * kChannels, first + slot, pair, values);
  }
}

// `count` elements, a multiple of 16 bytes.
template <class T>
XATTN_DEVICE void copy_to_shared(T* to, const T* from, int count) {
  using Vector = Pack<T, kVector<T>>;
  for (int i = threadIdx.x; i < count / kVector<T>; i += blockDim.x) {
    reinterpret_cast<Vector*>(to)[i] = reinterpret_cast<const Vector*>(from)[i];
  }
}

// Sixteen rows as the left operand of a product. A lane has elements of rows g and g + 8.
template <class T>
struct Rows {
  FragmentA<T> step[kSteps];

  XATTN_DEVICE void load(const T* s) {
#pragma unroll
    for (int k = 0; k < kSteps - 1; ++k) load_a(step[k], s + 16 * k, kColumns);
    FragmentA<T>& last = step[kSteps - 1];
    s += 16 * (kSteps - 1);
    const int l = lane_id();
    if constexpr (kIsShort<T>) {
      ptx::ldmatrix<2, false>(last.pairs, s + (l & 15) * kColumns);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* from = s + ((l >> 2) + 8 * i) * kColumns + (l & 3) * 2;
        const auto pair = *reinterpret_cast<const Pack<float, 2>*>(from);
        last.pairs[i][0] = pair.v[0];
        last.pairs[i][1] = pair.v[1];
      }
    }
  }

  // A product, rounded to T.
  XATTN_DEVICE void set(const float (&c)[kTiles][4]) {
    const float zeros[4] = {};
#pragma unroll
    for (int k = 0; k < kSteps - 1; ++k) step[k] = as_a<T>(c[2 * k], c[2 * k + 1]);
    step[kSteps - 1] = as_a<T>(c[kTiles - 1], zeros);
  }

  XATTN_DEVICE void store(T* s) const {
    const int l = lane_id();
    s += (l >> 2) * kColumns + (l & 3) * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        memcpy(s + i * 8 * kColumns + 8 * n, &step[n / 2].pairs[2 * (n % 2) + i], 2 * sizeof(T));
      }
    }
  }
};

// kCount (1 or 2) neighbouring tiles of B. kTransposed: rows of s are columns of B. kHalf: rows
// 0 .. 7 of B alone.
template <bool kTransposed, bool kHalf, int kCount, class T>
XATTN_DEVICE void load_tiles(FragmentB<T> (&b)[2], const T* s, int stride) {
  if constexpr (!kHalf) {
    if constexpr (kCount == 2 && kTransposed) {
      load_b_pair(b, s, stride);
    } else if constexpr (kCount == 2) {
      load_b_pair_transposed(b, s, stride);
    } else if constexpr (kTransposed) {
      load_b(b[0], s, stride);
    } else {
      load_b_transposed(b[0], s, stride);
    }
  } else {
    const int l = lane_id();
    if constexpr (kIsShort<T>) {
      const int tile = kCount == 2 ? (l >> 3) & 1 : 0;  // of which this lane names a row
      const int at = kTransposed ? ((l & 7) + 8 * tile) * stride : (l & 7) * stride + 8 * tile;
      uint32_t r[2];
      ptx::ldmatrix<2, !kTransposed>(r, s + at);
      b[0].pairs[0] = r[0];
      b[1].pairs[0] = r[1];
    } else {
      const int n = l >> 2, k = (l & 3) * 2;
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = kTransposed ? (n + 8 * t) * stride + k + j : (k + j) * stride + n + 8 * t;
          b[t].pairs[0][j] = s[at];
        }
      }
    }
  }
}

// c [16, 8 kCount] += a [16, 16 or 8] m. kExact: see multiply_add_exact.
// m: [16 or 8, 8 kCount], kTransposed: [8 kCount, 16 or 8].
template <bool kTransposed, bool kHalf, bool kExact = false, int kCount, class T>
XATTN_DEVICE void multiply_step(float (&c)[kCount][4], const FragmentA<T>& a, const T* m,
                                int stride) {
#pragma unroll
  for (int n = 0; n < kCount; n += 2) {
    const T* const at = m + 8 * n * (kTransposed ? stride : 1);
    FragmentB<T> b[2];
    if (n + 1 < kCount) {
      load_tiles<kTransposed, kHalf, 2>(b, at, stride);
    } else {
      load_tiles<kTransposed, kHalf, 1>(b, at, stride);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (n + i >= kCount) continue;
      if constexpr (kHalf) {
        multiply_add_half(c[n + i], a, b[i]);
      } else if constexpr (kExact) {
        multiply_add_exact(c[n + i], a, b[i]);
      } else {
        multiply_add(c[n + i], a, b[i]);
      }
    }
  }
}

// c [16, 8 kCount] += a [16, kColumns] m; m: [kColumns, kCount * 8], kTransposed:
// [kCount * 8, kColumns], either with rows of kColumns.
template <bool kTransposed, int kCount, class T>
XATTN_DEVICE void multiply(float (&c)[kCount][4], const Rows<T>& a, const T* m) {
  constexpr int kNext = 16 * (kTransposed ? 1 : kColumns);
#pragma unroll
  for (int k = 0; k < kSteps - 1; ++k) {
    multiply_step<kTransposed, false>(c, a.step[k], m + k * kNext, kColumns);
  }
  multiply_step<kTransposed, true>(c, a.step[kSteps - 1], m + (kSteps - 1) * kNext, kColumns);
}

// c = the same row, [kColumns], 16 times.
XATTN_DEVICE void set_rows(float (&c)[kTiles][4], const float* row) {
  row += (lane_id() & 3) * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    c[n][0] = c[n][2] = row[8 * n];
    c[n][1] = c[n][3] = row[8 * n + 1];
  }
}

// c times a factor for rows g, and one for rows g + 8.
template <int kCount>
XATTN_DEVICE void scale_rows(float (&c)[kCount][4], float upper, float lower) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    c[n][0] *= upper;
    c[n][1] *= upper;
    c[n][2] *= lower;
    c[n][3] *= lower;
  }
}

// Bits 4 n + i of which logits s[n][i] of a lane count, where channels of few tokens share a tile
// of 16 rows: those of keys of the row's own channel that are in the map.
XATTN_DEVICE unsigned keys_seen(int tokens, int slots_log2) {
  unsigned seen = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = (lane_id() >> 2) + ((i >> 1) & 1) * 8;
    const int key = (i >> 2) * 8 + (lane_id() & 3) * 2 + (i & 1);
    const bool same = row >> slots_log2 == key >> slots_log2;
    seen |= same && (key & ((1 << slots_log2) - 1)) < tokens ? 1u << i : 0u;
  }
  return seen;
}

// The weights and shifts of the absorbed form: logits in base 2 are (X A + a) X^T, the result is
// softmax(logits) X B + b.
template <class T>
struct Absorbed {
  const T* query;            // A [kColumns, kColumns], zeros beyond the pixels
  const T* result;           // B
  const float* query_bias;   // a [kColumns]
  const float* result_bias;  // b
};

}  // namespace xattn::cpsa_cuda
