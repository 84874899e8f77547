// Products of the heads of a band: rows of 64 channels against a D x D matrix a head, as one 64 x
// 64 matrix that is zero between heads. Blocks of it that no head reaches are left out.
//
// Zeros do not stop what is not finite: in a query, a value or a gradient it spoils its token in
// the whole band.
#pragma once

#include "common/depthwise_strip.cuh"
#include "common/mma.cuh"

namespace xattn::convrel_cuda {

// 8 mod 64 halves: ldmatrix has no bank conflicts.
constexpr int kTileRow = kTileChannels + 8;

constexpr int kTileValues = kTileTokens * kTileRow;
constexpr int kMatrixValues = kTileChannels * kTileRow;

// Channels first .. last of the band, or none; and their heads.
struct HeadRange {
  int first, last;  // heads

  XATTN_DEVICE HeadRange(const Bands& bands, const Band& band, int c, int count) {
    const int low = max(c, band.low), high = min(c + count, band.high);
    first = low < high ? low / bands.unit : 0;
    last = low < high ? (high - 1) / bands.unit : -1;
  }
};

// Bit 8 k + n: whether a head has channels both among 16 from row + 16 k and 8 from column + 8 n.
XATTN_DEVICE uint32_t head_blocks(const Bands& bands, const Band& band, int row, int column) {
  const int l = lane_id();
  const HeadRange rows(bands, band, row + l / 8 * 16, 16);
  const HeadRange columns(bands, band, column + l % 8 * 8, 8);
  const bool together = rows.last >= rows.first && columns.last >= columns.first &&
                        rows.first <= columns.last && columns.first <= rows.last;
  return __ballot_sync(kWholeWarp, together);
}

// s[i][j] = that entry of the heads' matrices for channels row + i, column + j, rounded to T. They
// are `matrices`, [channels][row_values] of an image; transposed: s[j][i] in its place.
template <class T>
XATTN_DEVICE void load_matrix(T* s, const float* matrices, int row_values, const Bands& bands,
                              const Band& band, int row, int column, bool transposed) {
  static_assert(kStripThreads % kTileChannels == 0);
  const int j = threadIdx.x % kTileChannels, c = column + j;
  const int head = c / bands.unit * bands.unit;  // its first channel
  const bool own = c >= band.low && c < band.high;
  for (int i = threadIdx.x / kTileChannels; i < kTileChannels; i += kStripThreads / kTileChannels) {
    const int r = row + i;
    const bool together = own && r >= head && r < head + bands.unit;
    const float value = together ? matrices[static_cast<int64_t>(r) * row_values + c - head] : 0.f;
    s[transposed ? j * kTileRow + i : i * kTileRow + j] = from_float<T>(value);
  }
}

// A block's product [kTileTokens, 64], in C fragments: a warp has 16 tokens and half the columns.
struct TileProduct {
  static constexpr int kHalf = kTileChannels / 2;
  static_assert(kTileTokens == 32 && kStripThreads == 128);
  float sum[4][4] = {};
  int token, column;  // the warp's first

  XATTN_DEVICE TileProduct() {
    const int warp = threadIdx.x / 32;
    token = warp % 2 * 16;
    column = warp / 2 * kHalf;
  }

  // += x m, or x m^T; blocks: of head_blocks for the channels of x and those of the product.
  template <bool kTransposed, class T>
  XATTN_DEVICE void add(const T* x, const T* m, uint32_t blocks) {
#pragma unroll
    for (int k = 0; k < kTileChannels / 16; ++k) {
      const uint32_t row = blocks >> (8 * k + column / 8) & 15;
      if (row == 0) continue;
      FragmentA<T> a;
      load_a(a, x + token * kTileRow + 16 * k, kTileRow);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        if ((row >> n & 3) == 0) continue;
        FragmentB<T> b[2];
        if constexpr (kTransposed) {
          load_b_pair(b, m + (column + 8 * n) * kTileRow + 16 * k, kTileRow);
        } else {
          load_b_pair_transposed(b, m + 16 * k * kTileRow + column + 8 * n, kTileRow);
        }
        multiply_add(sum[n], a, b[0]);
        multiply_add(sum[n + 1], a, b[1]);
      }
    }
  }

  // To shared memory, rows of kTileRow.
  XATTN_DEVICE void store(float* s) const {
    float* to = s + (token + lane_id() / 4) * kTileRow + column + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      *reinterpret_cast<Pack<float, 2>*>(to + 8 * n) = {{sum[n][0], sum[n][1]}};
      *reinterpret_cast<Pack<float, 2>*>(to + 8 * n + 8 * kTileRow) = {{sum[n][2], sum[n][3]}};
    }
  }
};

}  // namespace xattn::convrel_cuda
