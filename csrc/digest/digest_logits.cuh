// From products of queries and keys to logits: the bias, looked up by places on the grid, and the
// dropout of what becomes of them.
#pragma once

#include "digest_tile.cuh"

namespace xattn::digest_cuda {

// The relative bias of a head. On the fast way the table lies mirrored in shared memory,
// [2 grid_h - 1][2 grid_w - 1] by dy and dx with a zero behind it, and the numbers of places are
// such that a lookup is one subtraction; else it is read where it lies.
template <class T, bool kFast>
struct Relative {
  struct Place {
    int y, x;
  };
  const T* table;
  int grid_w, prefix;

  static size_t shared_floats(int, int) { return 0; }
  XATTN_DEVICE Relative(const Args& a, int head, float*)
      : table(static_cast<const T*>(a.bias_table)), grid_w(a.grid_w), prefix(a.prefix) {
    if (table != nullptr) table += static_cast<int64_t>(head) * a.grid_h * a.grid_w;
  }
  XATTN_DEVICE bool present() const { return table != nullptr; }
  // A token of the prefix has no place.
  XATTN_DEVICE Place place(int token) const {
    const int patch = token - prefix;
    return patch < 0 ? Place{-1, 0} : Place{patch / grid_w, patch % grid_w};
  }
  XATTN_DEVICE Place query(int token) const { return place(token); }
  XATTN_DEVICE Place key(int token) const { return place(token); }
  XATTN_DEVICE float bias(Place query, Place key) const {
    if (query.y < 0 || key.y < 0) return 0;
    return to_float(table[abs(query.y - key.y) * grid_w + abs(query.x - key.x)]);
  }
};

template <class T>
struct Relative<T, true> {
  using Place = int;
  static constexpr int kNoPlace = 1 << 29;  // leads beyond the table from wherever it is met
  const float* mirror;
  int grid_w, prefix, center, size;
  bool given;

  static size_t shared_floats(int grid_h, int grid_w) {
    return static_cast<size_t>(2 * grid_h - 1) * (2 * grid_w - 1) + 1;
  }
  // Needs a barrier before the first lookup.
  XATTN_DEVICE Relative(const Args& a, int head, float* shared)
      : mirror(shared),
        grid_w(a.grid_w),
        prefix(a.prefix),
        center((a.grid_h - 1) * (2 * a.grid_w - 1) + a.grid_w - 1),
        size((2 * a.grid_h - 1) * (2 * a.grid_w - 1)),
        given(a.bias_table != nullptr) {
    if (!given) return;
    const T* table = static_cast<const T*>(a.bias_table) + head * a.grid_h * grid_w;
    for (int i = threadIdx.x; i <= size; i += kThreads) {
      const int dy = i / (2 * grid_w - 1) - (a.grid_h - 1);
      const int dx = i % (2 * grid_w - 1) - (grid_w - 1);
      shared[i] = i == size ? 0.0f : to_float(table[abs(dy) * grid_w + abs(dx)]);
    }
  }
  XATTN_DEVICE bool present() const { return given; }
  XATTN_DEVICE Place query(int token) const {
    const int patch = token - prefix;
    return patch < 0 ? kNoPlace : patch / grid_w * (2 * grid_w - 1) + patch % grid_w + center;
  }
  XATTN_DEVICE Place key(int token) const {
    const int patch = token - prefix;
    return patch < 0 ? -kNoPlace : patch / grid_w * (2 * grid_w - 1) + patch % grid_w;
  }
  XATTN_DEVICE float bias(Place query, Place key) const { return mirror[min(query - key, size)]; }
};

// The lane's element e of tile n of a product: row 8 (e / 2) of its two rows, and this column.
XATTN_DEVICE int column_of(int n, int e) { return n * 8 + lane_id() % 4 * 2 + (e & 1); }

// x = scale x + bias(row 0 or 1, column), for kStep columns.
template <class F>
XATTN_DEVICE void add_bias(float (&x)[kStepTiles][4], float scale, F bias) {
#pragma unroll
  for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = fmaf(x[n][e], scale, bias(e >> 1, column_of(n, e)));
  }
}

// x where the lane's rows are queries and the columns keys. places: of the columns, if they are
// tokens; biases: of the columns, if they are digests.
template <class R>
XATTN_DEVICE void logits_by_query(float (&x)[kStepTiles][4], const Args& a, const R& relative,
                                  const typename R::Place (&queries)[2], bool digests,
                                  const typename R::Place* places, const float* biases) {
  if (digests) {
    add_bias(x, a.scale, [&](int, int column) { return biases[column]; });
  } else if (relative.present()) {
    add_bias(x, a.scale,
             [&](int row, int column) { return relative.bias(queries[row], places[column]); });
  } else {
    add_bias(x, a.scale, [](int, int) { return 0.0f; });
  }
}

// x where the lane's rows are keys and the columns queries.
template <class R>
XATTN_DEVICE void logits_by_key(float (&x)[kStepTiles][4], const Args& a, const R& relative,
                                const typename R::Place (&keys)[2], bool digests,
                                const float (&biases)[2], const typename R::Place* queries) {
  if (digests || !relative.present()) {
    add_bias(x, a.scale, [&](int row, int) { return biases[row]; });
  } else {
    add_bias(x, a.scale,
             [&](int row, int column) { return relative.bias(queries[column], keys[row]); });
  }
}

// The words of dropout come in fours, for neighbouring queries. The lanes that need parts of the
// same four compute one counter each and exchange.
struct Keep {
  const Dropout& dropout;
  uint64_t seed, unit;
  int keys;  // of a whole row

  XATTN_DEVICE Keep(const Args& a, int64_t unit)
      : dropout(a.dropout),
        seed(a.dropout.seed != nullptr ? static_cast<uint64_t>(*a.dropout.seed) : 0),
        unit(static_cast<uint64_t>(unit)),
        keys(a.keys()) {}
  XATTN_DEVICE bool drops() const { return dropout.seed != nullptr; }

  XATTN_DEVICE static uint32_t select(const DropoutWords& words, int w) {
    return w < 2 ? (w == 0 ? words.word[0] : words.word[1])
                 : (w == 2 ? words.word[2] : words.word[3]);
  }

  // Factors of a tile: rows are the queries from `query` (a multiple of 16), columns keys from
  // `key`. Four lanes of neighbouring rows need word 0 .. 3 of four counters, those of their four
  // elements: lane r computes that of element r.
  XATTN_DEVICE void by_query(float (&factor)[4], int query, int key) const {
    const int row = lane_id() / 4, mine = row % 4;
    const int block = query / 4 + row / 4 + (mine >> 1) * 2;
    const int column = key + lane_id() % 4 * 2 + (mine & 1);
    const DropoutWords words = dropout_words(seed, unit, block, column, keys);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      // To the lane x away its word of my counter; from it mine of its counter, element mine ^ x.
      const uint32_t word = __shfl_xor_sync(kWholeWarp, select(words, mine ^ x), x * 4);
      const float value = keep_weight(dropout, word);
#pragma unroll
      for (int e = 0; e < 4; ++e) factor[e] = (mine ^ x) == e ? value : (x == 0 ? 0 : factor[e]);
    }
  }

  // x times the factors of kStep columns.
  XATTN_DEVICE void weigh_by_query(float (&x)[kStepTiles][4], int query, int key) const {
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
      float factor[4];
      by_query(factor, query, key + n * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] *= factor[e];
    }
  }

  // The same where rows are the keys from `key` and columns queries from `query` (a multiple of
  // 8). Two lanes need the halves of two counters, those of their two keys.
  XATTN_DEVICE void by_key(float (&factor)[4], int key, int query) const {
    const int mine = lane_id() % 2;
    const DropoutWords words = dropout_words(seed, unit, query / 4 + lane_id() % 4 / 2,
                                             key + lane_id() / 4 + 8 * mine, keys);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // of the two queries
      const uint32_t kept = words.word[i], other = words.word[2 + i];
      const uint32_t got = __shfl_xor_sync(kWholeWarp, mine == 0 ? other : kept, 1);
      factor[i] = keep_weight(dropout, mine == 0 ? kept : got);
      factor[2 + i] = keep_weight(dropout, mine == 0 ? got : other);
    }
  }
};

}  // namespace xattn::digest_cuda
