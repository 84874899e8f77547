// How a block of queries meets all keys: shared memory, and tiles of the tokens, then the digests.
#pragma once

#include "digest_logits.cuh"

namespace xattn::digest_cuda {

// Shared memory of a block with kLeft matrices of rows; behind it the mirrored table.
template <class L, int kLeft>
struct alignas(16) Memory {
  using T = typename L::Value;
  using R = Relative<T, L::kFast>;
  T rows[kLeft][kRows * L::kStride];
  T columns[L::kStages][2][L::kColumns * L::kStride];
  float numbers[L::kStages][3][L::kColumns];  // of columns: bias, or what a query's row needs
  typename R::Place places[L::kStages][L::kColumns];

  XATTN_DEVICE float* table() { return reinterpret_cast<float*>(this + 1); }
  static size_t bytes(int grid_h, int grid_w, bool has_table) {
    const size_t floats = has_table ? R::shared_floats(grid_h, grid_w) : 0;
    return sizeof(Memory) + floats * sizeof(float);
  }
};

struct KeyTile {
  bool digests;
  int first, count;
  // What dropout calls its first key: digests come after the tokens.
  XATTN_DEVICE int number(const Args& a) const { return digests ? a.tokens + first : first; }
};

// Tiles of `width` keys.
XATTN_DEVICE int key_tiles(const Args& a, int width) {
  return ceil_div(a.tokens, width) + ceil_div(a.digests, width);
}
XATTN_DEVICE KeyTile key_tile(const Args& a, int t, int width) {
  const int of_tokens = ceil_div(a.tokens, width);
  const bool digests = t >= of_tokens;
  const int first = (digests ? t - of_tokens : t) * width;
  return {digests, first, min((digests ? a.digests : a.tokens) - first, width)};
}

template <class T>
XATTN_DEVICE float digest_bias(const Args& a, int head, int digest) {
  if (a.digest_bias == nullptr) return 0;
  const int64_t at = static_cast<int64_t>(head) * a.digests + digest;
  return to_float(static_cast<const T*>(a.digest_bias)[at]);
}

template <class L, int kLeft>
struct KeyColumns {
  using T = typename L::Value;
  using M = Memory<L, kLeft>;
  using R = typename M::R;
  const Args& a;
  const Image<T>& image;
  const R& relative;
  M* memory;

  XATTN_DEVICE KeyTile tile(int t) const { return key_tile(a, t, L::kColumns); }

  // Places or biases of a tile's keys.
  XATTN_DEVICE void mark(const KeyTile& tile, int stage) const {
    for (int i = threadIdx.x; i < L::kColumns; i += kThreads) {
      const int key = tile.first + min(i, tile.count - 1);
      if (tile.digests) {
        memory->numbers[stage][0][i] = digest_bias<T>(a, image.head, key);
      } else if (relative.present()) {
        memory->places[stage][i] = relative.key(key);
      }
    }
  }

  // Fast: a whole tile of keys and values, in the background.
  XATTN_DEVICE void issue(int t, int stage) const {
    const KeyTile at = tile(t);
    for (int which = 0; which < 2; ++which) {
      load_rows<L, L::kColumns>(memory->columns[stage][which],
                                image.keys(which, at.digests, at.first), true);
    }
    mark(at, stage);
    ptx::cp_async_commit();
  }

  // General: waits for one chunk of a matrix of keys or values.
  XATTN_DEVICE void reload(const KeyTile& at, int which, int chunk) const {
    __syncthreads();
    load_rows<L, L::kColumns>(memory->columns[0][which],
                              image.keys(which, at.digests, at.first).chunk(chunk, L::kWidth),
                              a.vector);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // x [16, kStep]: logits of the warp's queries and the keys from `step` of a tile.
  XATTN_DEVICE void logits(float (&x)[kStepTiles][4], const typename R::Place (&queries)[2],
                           const KeyTile& at, int stage, int step) const {
    logits_by_query(x, a, relative, queries, at.digests, memory->places[stage] + step,
                    memory->numbers[stage][0] + step);
    const int left = at.count - step;
    if (left >= kStep) return;
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column_of(n, e) >= left) x[n][e] = -INFINITY;
      }
    }
  }
};

// The first of the 16 rows of this warp, and row 0 or 1 of its lane, in a block.
XATTN_DEVICE int warp_row() { return threadIdx.x / 32 * 16; }
XATTN_DEVICE int lane_row(int half) { return warp_row() + lane_id() / 4 + 8 * half; }

}  // namespace xattn::digest_cuda
