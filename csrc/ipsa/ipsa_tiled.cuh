// What the kernels of large windows and wide heads share: tiles of 64 tokens, channels by chunks.
#pragma once

#include "ipsa_logits.cuh"

namespace xattn::ipsa_cuda {

// Channels in shared memory at a time; any number of them fits every card.
template <class T>
constexpr int kChunk = kIsShort<T> ? 64 : 32;

// Where a block of the grid stands: heads x tiles x windows, or runs of them.
struct TiledBlock {
  int head, tile;
  int64_t index;  // of the window or run
  int64_t part;   // of the tile of a run

  template <class T>
  XATTN_DEVICE explicit TiledBlock(const Args<T>& a)
      : head(blockIdx.x % a.heads),
        tile(blockIdx.x / a.heads % a.tiles()),
        index(blockIdx.x / a.heads / a.tiles()),
        part(blockIdx.x / a.heads) {}
};

// Of the tokens of a tile, as every thread needs them.
struct TileTokens {
  int code[kTile];    // or -1 where the token only fills the tile
  int region[kTile];  // see Place
};

// A thread's share of a tile: its token's rows, and what others must know of the token.
template <class T, int kD>
struct TileLoader {
  RowLoader<T, kD> rows;
  int token_code, region;

  XATTN_DEVICE TileLoader(const Args<T>& a, int head) : rows(a, head) {}

  XATTN_DEVICE void find(const Window& w, int tile) {
    const Token token = token_at(rows.a, tile * kTile + rows.row());
    const Place place = place_of(rows.a, w, token);
    rows.find(w, place);
    token_code = token.real ? code(rows.a, token) : -1;
    region = place.region;
  }
  XATTN_DEVICE void publish(TileTokens& tokens) const {
    if (threadIdx.x & 1) return;
    tokens.code[rows.row()] = token_code;
    tokens.region[rows.row()] = region;
  }
};

XATTN_DEVICE void wait_for_copies() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// The logits of a warp's 16 rows, from products of q and k; kNever for strangers and
// beyond the window. Rows are queries, or, if kKeysAreRows, keys.
template <bool kKeysAreRows, class T>
XATTN_DEVICE void finish_logits(const Args<T>& a, int head, const TileTokens& rows,
                                const TileTokens& columns, float (&s)[kTile / 8][4]) {
  const int first_row = warp_id() * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row_code = rows.code[first_row + lane_row(half)];
    const int row_region = rows.region[first_row + lane_row(half)];
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      const int column = i / 2 * 8 + lane_column() + i % 2, column_code = columns.code[column];
      const int query = kKeysAreRows ? column_code : row_code;
      const int key = kKeysAreRows ? row_code : column_code;
      float& logit = s[i / 2][2 * half + i % 2];
      if (key < 0 || (query >= 0 && row_region != columns.region[column])) {
        logit = kNever;
      } else {  // queries that only fill the tile see every key, lest their rows be empty
        logit = logit * a.scale + (query < 0 ? 0.0f : bias_of(a, head, query, key));
      }
    }
  }
}

}  // namespace xattn::ipsa_cuda
