// What is added to the logits (bias of the relative position, the shift's mask), and the softmax
// and the dropout of the weights, in the order in which the lanes of a warp hold them
// (ipsa_tile.cuh).
#pragma once

#include "ipsa_tile.cuh"

namespace xattn::ipsa_cuda {

// The bias of a query and a key, given their codes.
template <class T>
XATTN_DEVICE float bias_of(const Args<T>& a, int head, int query_code, int key_code) {
  if (a.bias_table == nullptr) return 0.0f;
  const int64_t bin = query_code - key_code + code_centre(a);
  return to_float(a.bias_table[bin * a.heads + head]);
}

// The bias of one lane's values in a window of one tile; kNever for keys beyond the window.
template <class T, int kN>
XATTN_DEVICE void window_bias(const Args<T>& a, int head, float (&bias)[kN][4]) {
  const int first = warp_id() * 16;
  const Token queries[2] = {token_at(a, first + lane_row(0)), token_at(a, first + lane_row(1))};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Token &query = queries[e / 2], key = token_at(a, n * 8 + lane_column() + e % 2);
      bias[n][e] = kNever;
      if (key.real) bias[n][e] = query.real ? bias_of(a, head, code(a, query), code(a, key)) : 0.0f;
    }
  }
}

// Which keys of a window of one tile are strangers to a lane's queries, where seams run through it.
struct ShiftMask {
  uint32_t around_y, around_x;      // bit 2 n + e % 2: the key goes around a seam in y, in x
  uint32_t query_y[2], query_x[2];  // all bits: the query does
  bool real[2];  // a query that only fills the tile sees everything, lest its row be empty

  template <class T>
  XATTN_DEVICE explicit ShiftMask(const Args<T>& a) : around_y(0), around_x(0) {
    const auto goes_y = [&](const Token& t) { return t.y >= a.window_h - a.shift_h; };
    const auto goes_x = [&](const Token& t) { return t.x >= a.window_w - a.shift_w; };
    for (int i = 0; i < kTile / 4; ++i) {
      const Token key = token_at(a, i / 2 * 8 + lane_column() + i % 2);
      around_y |= static_cast<uint32_t>(goes_y(key)) << i;
      around_x |= static_cast<uint32_t>(goes_x(key)) << i;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Token query = token_at(a, warp_id() * 16 + lane_row(half));
      query_y[half] = goes_y(query) ? ~0u : 0u;
      query_x[half] = goes_x(query) ? ~0u : 0u;
      real[half] = query.real;
    }
  }

  template <int kN>
  XATTN_DEVICE void apply(int seams, float (&s)[kN][4]) const {
    if (seams == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t strangers = 0;
      if (seams & 1) strangers |= around_y ^ query_y[half];
      if (seams & 2) strangers |= around_x ^ query_x[half];
      if (!real[half]) strangers = 0;
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        if (strangers >> i & 1) s[i / 2][2 * half + i % 2] = kNever;
      }
    }
  }
};

// Which weights stay: bit 4 n + e, of a tile that starts at these queries (rows) and keys
// (columns). Four lanes share the words of their four queries, one counter each.
XATTN_DEVICE uint32_t keep_bits(const Dropout& dropout, uint64_t unit, int first_query,
                                int first_key, int tokens) {
  if (dropout.seed == nullptr) return ~0u;
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  const int mine =
      lane_row(0) & 3;  // of the places (query half, key) = (0, 0), (0, 1), (1, 0), ...
  const int query = first_query + lane_row(mine / 2), key = first_key + lane_column() + mine % 2;
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < kTile / 8; ++n) {
    DropoutWords words = dropout_words(seed, unit, query / 4, key + n * 8, tokens);
    transpose_words<4>(words.word);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bits |= static_cast<uint32_t>(words.word[e] >= dropout.threshold) << (4 * n + e);
    }
  }
  return bits;
}

// The same where rows are keys and columns queries: two lanes share a counter's words.
XATTN_DEVICE uint32_t keep_bits_of_keys(const Dropout& dropout, uint64_t unit, int first_key,
                                        int first_query, int tokens) {
  if (dropout.seed == nullptr) return ~0u;
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  const bool second = lane_id() & 1;  // of the two; holds queries 2 and 3 of the four
  const int key = first_key + lane_row(second), query = first_query + lane_column();
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < kTile / 8; ++n) {
    const DropoutWords words = dropout_words(seed, unit, (query + n * 8) / 4, key, tokens);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t own = second ? words.word[2 + i] : words.word[i];
      const uint32_t given = second ? words.word[i] : words.word[2 + i];
      const uint32_t got = __shfl_xor_sync(kWholeWarp, given, 1);
      const bool keep[2] = {(second ? got : own) >= dropout.threshold,
                            (second ? own : got) >= dropout.threshold};
      bits |= static_cast<uint32_t>(keep[0]) << (4 * n + i);
      bits |= static_cast<uint32_t>(keep[1]) << (4 * n + 2 + i);
    }
  }
  return bits;
}

// Of each of the lane's rows.
template <int kN>
XATTN_DEVICE void row_max(const float (&s)[kN][4], float (&highest)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m = s[0][2 * half];
#pragma unroll
    for (int i = 1; i < 2 * kN; ++i) m = fmaxf(m, s[i / 2][2 * half + i % 2]);
    highest[half] = quad_max(m);
  }
}

// e^(s - level). The product with s is not rounded, however large s is; that with the level is, but
// alike for a whole row, so that the softmax cancels it.
XATTN_DEVICE float exp_above(float s, float level) {
  return ptx::exp2(fmaf(s, kLog2e, -level * kLog2e));
}

// s = e^(s - level), and its sum over each row.
template <int kN>
XATTN_DEVICE void exponentials(float (&s)[kN][4], const float (&level)[2], float (&total)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      float& weight = s[i / 2][2 * half + i % 2];
      weight = exp_above(weight, level[half]);
      sum += weight;
    }
    total[half] = quad_sum(sum);
  }
}

// The softmax of a lane's two rows so far, tile by tile.
struct RunningSoftmax {
  float highest[2] = {kNever, kNever}, total[2] = {};

  // s = e^(s - the highest so far); before: what sums over earlier tiles are to be multiplied by.
  template <int kN>
  XATTN_DEVICE void add(float (&s)[kN][4], float (&before)[2]) {
    float above[2], level[2], tile_total[2];
    row_max(s, above);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      above[half] = fmaxf(above[half], highest[half]);
      level[half] = above[half] == kNever ? 0.0f : above[half];  // a tile of strangers
    }
    exponentials(s, level, tile_total);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      before[half] = exp_above(highest[half], level[half]);
      highest[half] = above[half];
      total[half] = total[half] * before[half] + tile_total[half];
    }
  }
};

// Weights, or their gradients, times their dropout factors.
template <int kN>
XATTN_DEVICE void drop(const Dropout& dropout, uint32_t keep, float (&weights)[kN][4]) {
  if (dropout.seed == nullptr) return;
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i) {
    float& w = weights[i / 4][i % 4];
    w = keep >> i & 1 ? w * dropout.keep_scale : 0.0f;
  }
}

// From exponentials p with their sums, and the gradients ds of the weights: the weights, and the
// logits' gradients. Short types forgive the rounding of an inverse.
template <class T, int kN>
XATTN_DEVICE void logit_gradients(float (&p)[kN][4], const float (&total)[2], float (&ds)[kN][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1 / total[half];
    float delta = 0;
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      float& weight = p[i / 2][2 * half + i % 2];
      weight = kIsShort<T> ? weight * inverse : weight / total[half];
      delta += weight * ds[i / 2][2 * half + i % 2];
    }
    delta = quad_sum(delta);
#pragma unroll
    for (int i = 0; i < 2 * kN; ++i) {
      float& gradient = ds[i / 2][2 * half + i % 2];
      gradient = p[i / 2][2 * half + i % 2] * (gradient - delta);
    }
  }
}

}  // namespace xattn::ipsa_cuda
