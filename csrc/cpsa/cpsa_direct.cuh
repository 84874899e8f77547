// The attention of cross-patch attention on CUDA, direct form: any number of heads, dropout, any
// number of tokens, heads of any length.
//
// A unit is one head of one channel of one image: a matrix of tokens in rows [n, 3 width] = q, k, v
// and [n, width] = the result. A warp takes 16 rows of a unit and a part of up to 64 columns of a
// head, alone: warps share nothing. Longer heads have their logits computed once for each part.
#pragma once

#include "common/philox.cuh"
#include "cpsa_rows.cuh"

namespace xattn::cpsa_cuda {

constexpr int kDirectWarps = 4;
constexpr int kOthers = 32;             // keys of queries, or queries of keys, at a time
constexpr int kPart = 64;               // columns of a head at a time
constexpr int kPartStride = kPart + 8;  // free of bank conflicts
constexpr int kPartTiles = kPart / 8;

template <class T>
struct DirectCall {
  int64_t units;
  int tokens, tiles, parts;  // tiles of 16 rows, parts of a head
  HeadLayout head;
  float scale;  // of the logits in base 2
  Dropout dropout;
  const T* qkv;
  T* out;  // the heads' results
  // [2, units, tokens]: of each row the highest logit, and 1 over the sum of its exponentials: as
  // one logarithm they would round the weights of large logits. Null where they are not wanted.
  float* statistics;
  const T* grad_out;  // of the heads' results
  float* delta;       // [units, tokens]: of each row the sum of weights times their gradients
  T* grad_qkv;
};

// What a warp takes.
template <class T>
struct DirectItem {
  int64_t unit, row;  // row: of the unit's first token
  int tile, part, head;

  XATTN_DEVICE explicit DirectItem(const DirectCall<T>& call) {
    const int64_t item = int64_t{blockIdx.x} * kDirectWarps + threadIdx.x / 32;
    part = static_cast<int>(item % call.parts);
    tile = static_cast<int>(item / call.parts % call.tiles);
    unit = item / call.parts / call.tiles;
    head = static_cast<int>(unit % call.head.heads);
    row = unit / call.head.heads * call.tokens;
  }
};

// One matrix of a unit: tokens in rows of `stride`.
template <class T>
struct Tokens {
  const T* first;
  int64_t stride;
  int tokens, padded;

  // Tokens [token, token + kRows) and columns [column, column + kPart) into shared memory of this
  // warp, zeros beyond either; up to whole steps of 16 columns.
  template <int kRows>
  XATTN_DEVICE void load(T* to, int token, int column) const {
    constexpr int kVectors = kPart / kVector<T>;
    const int width = min(kPart, (padded - column + 15) / 16 * 16);
    const int vector = lane_id() % kVectors * kVector<T>;
    if (vector >= width) return;
#pragma unroll 4
    for (int r = lane_id() / kVectors; r < kRows; r += 32 / kVectors) {
      const bool there = token + r < tokens && column + vector < padded;
      const T* const at = first + (token + r) * stride + column + vector;
      ptx::cp_async<16>(to + r * kPartStride + vector, there ? at : first, there);
    }
  }
};

// which: 0, 1, 2 for q, k, v.
template <class T>
XATTN_DEVICE Tokens<T> tokens_of(const DirectCall<T>& call, const DirectItem<T>& item, int which) {
  const int64_t stride = int64_t{3} * call.head.width();
  const T* const first = call.qkv + item.row * stride + which * call.head.width();
  return {first + item.head * call.head.padded, stride, call.tokens, call.head.padded};
}
template <class T>
XATTN_DEVICE Tokens<T> tokens_of(const DirectCall<T>& call, const DirectItem<T>& item,
                                 const T* rows) {
  const int64_t stride = call.head.width();
  return {rows + item.row * stride + item.head * call.head.padded, stride, call.tokens,
          call.head.padded};
}

XATTN_DEVICE void wait_for_loads() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
}

// A warp's memory.
template <class T>
struct DirectTiles {
  T *left, *right;  // [16, kPartStride], [kOthers, kPartStride]

  static constexpr int kBytes = (16 + kOthers) * kPartStride * sizeof(T);
  XATTN_DEVICE explicit DirectTiles(unsigned char* memory)
      : left(reinterpret_cast<T*>(memory + threadIdx.x / 32 * kBytes)),
        right(left + 16 * kPartStride) {}
};

// c [16, kOthers] = tokens `row` .. of left times tokens `other` .. of right, over a head.
template <class T>
XATTN_DEVICE void head_products(float (&c)[kOthers / 8][4], const DirectTiles<T>& tiles,
                                const Tokens<T>& left, const Tokens<T>& right, int row, int other) {
#pragma unroll
  for (int n = 0; n < kOthers / 8; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
  for (int column = 0; column < left.padded; column += kPart) {
    __syncwarp();  // the tiles before have been read
    left.template load<16>(tiles.left, row, column);
    right.template load<kOthers>(tiles.right, other, column);
    wait_for_loads();
    for (int k = 0; k < kPart && column + k < left.padded; k += 16) {
      FragmentA<T> a;
      load_a(a, tiles.left + k, kPartStride);
      multiply_step<true, false, true>(c, a, tiles.right + k, kPartStride);
    }
  }
}

// sums [16, a part of the head] += weights [16, kOthers] times tokens `other` ...
template <class T>
XATTN_DEVICE void add_tokens(float (&sums)[kPartTiles][4], const float (&weights)[kOthers / 8][4],
                             const DirectTiles<T>& tiles, const Tokens<T>& tokens, int other,
                             int part) {
  __syncwarp();
  tokens.template load<kOthers>(tiles.right, other, part * kPart);
  wait_for_loads();
  const int width = tokens.padded - part * kPart;
#pragma unroll
  for (int k = 0; k < kOthers / 16; ++k) {
    const FragmentA<T> a = as_a<T>(weights[2 * k], weights[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kPartTiles; n += 2) {
      if (8 * n >= width) continue;
      FragmentB<T> b[2];
      load_b_pair_transposed(b, tiles.right + 16 * k * kPartStride + 8 * n, kPartStride);
      multiply_add_exact(sums[n], a, b[0]);
      multiply_add_exact(sums[n + 1], a, b[1]);
    }
  }
}

// Sums times a factor, as rows in memory.
template <class T>
XATTN_DEVICE void store_part(const float (&sums)[kPartTiles][4], const Tokens<T>& to, int row,
                             int part, float factor) {
#pragma unroll
  for (int n = 0; n < kPartTiles; ++n) {
    const int column = part * kPart + 8 * n + (lane_id() & 3) * 2;
    if (column >= to.padded) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = row + (lane_id() >> 2) + 8 * i;
      if (token >= to.tokens) continue;
      T* const at = const_cast<T*>(to.first) + token * to.stride + column;
      *reinterpret_cast<Pack<T, 2>*>(at) = {
          {from_float<T>(sums[n][2 * i] * factor), from_float<T>(sums[n][2 * i + 1] * factor)}};
    }
  }
}

// f(n, j, row, column) for every element that a lane has of a tile [16, kOthers].
template <class F>
XATTN_DEVICE void for_elements(int row, int column, F f) {
#pragma unroll
  for (int n = 0; n < kOthers / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      f(n, j, row + (lane_id() >> 2) + (j >> 1) * 8,
        column + 8 * n + (lane_id() & 3) * 2 + (j & 1));
    }
  }
}

// The logits of keys from `key` on in base 2, -inf beyond the last.
template <class T>
XATTN_DEVICE void logits(float (&s)[kOthers / 8][4], const DirectCall<T>& call,
                         const DirectItem<T>& item, const DirectTiles<T>& tiles, int key) {
  head_products(s, tiles, tokens_of(call, item, 0), tokens_of(call, item, 1), item.tile * 16, key);
  for_elements(0, key, [&](int n, int j, int, int k) {
    s[n][j] = k < call.tokens ? s[n][j] * call.scale : -INFINITY;
  });
}

template <class T>
__global__ void __launch_bounds__(kDirectWarps * 32, 2) direct_result(DirectCall<T> call) {
  SHARED_DYNAMIC(unsigned char, memory);
  const DirectTiles<T> tiles(memory);
  const DirectItem<T> item(call);
  if (item.unit >= call.units) return;
  const bool drops = call.dropout.seed != nullptr;
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {}, sums[kPartTiles][4] = {};
  for (int key = 0; key < call.tokens; key += kOthers) {
    float s[kOthers / 8][4];
    logits(s, call, item, tiles, key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = highest[r];
#pragma unroll
      for (int n = 0; n < kOthers / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      top = quad_max(top);
      const float shift = top == -INFINITY ? 0 : top;  // lest -inf less -inf be NaN
      const float before = ptx::exp2(highest[r] - shift);
      highest[r] = top;
      total[r] *= before;
#pragma unroll
      for (int n = 0; n < kOthers / 8; ++n) {
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) total[r] += s[n][j] = ptx::exp2(s[n][j] - shift);
      }
#pragma unroll
      for (int n = 0; n < kPartTiles; ++n) {
        sums[n][2 * r] *= before;
        sums[n][2 * r + 1] *= before;
      }
    }
    if (drops) {
      for_elements(item.tile * 16, key, [&](int n, int j, int q, int k) {
        s[n][j] *= keep_weight(call.dropout, item.unit, q, k, call.tokens);
      });
    }
    add_tokens(sums, s, tiles, tokens_of(call, item, 2), key, item.part);
  }
  total[0] = quad_sum(total[0]);
  total[1] = quad_sum(total[1]);
  scale_rows(sums, 1 / total[0], 1 / total[1]);
  const Tokens<T> out = tokens_of(call, item, call.out);
  store_part(sums, out, item.tile * 16, item.part, 1.0f);
  if (call.statistics == nullptr || item.part > 0 || (lane_id() & 3) != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int q = item.tile * 16 + (lane_id() >> 2) + 8 * r;
    if (q >= call.tokens) continue;
    float* const to = call.statistics + item.unit * call.tokens + q;
    to[0] = highest[r];
    to[call.units * call.tokens] = 1 / total[r];
  }
}

// Of 16 queries and the keys from `key` on: w, the weights before dropout, and dw, the gradients of
// these. highest, factor: the statistics of rows g and g + 8.
template <class T>
XATTN_DEVICE void query_weights(float (&w)[kOthers / 8][4], float (&dw)[kOthers / 8][4],
                                const DirectCall<T>& call, const DirectItem<T>& item,
                                const DirectTiles<T>& tiles, int key, const float (&highest)[2],
                                const float (&factor)[2]) {
  const int row = item.tile * 16;
  logits(w, call, item, tiles, key);
  head_products(dw, tiles, tokens_of(call, item, call.grad_out), tokens_of(call, item, 2), row,
                key);
  for_elements(row, key, [&](int n, int j, int q, int k) {
    w[n][j] = ptx::exp2(w[n][j] - highest[j >> 1]) * factor[j >> 1];
    if (call.dropout.seed != nullptr) {
      dw[n][j] *= keep_weight(call.dropout, item.unit, q, k, call.tokens);
    }
  });
}

// The gradient of q, and delta: from the very weights and gradients that it is taken off, lest
// their rounding errors differ.
template <class T>
__global__ void __launch_bounds__(kDirectWarps * 32, 2) direct_queries(DirectCall<T> call) {
  SHARED_DYNAMIC(unsigned char, memory);
  const DirectTiles<T> tiles(memory);
  const DirectItem<T> item(call);
  if (item.unit >= call.units) return;
  const int row = item.tile * 16;
  float delta[2] = {}, highest[2] = {}, factor[2] = {}, sums[kPartTiles][4] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int q = row + (lane_id() >> 2) + 8 * r;
    if (q >= call.tokens) continue;
    const float* const from = call.statistics + item.unit * call.tokens + q;
    highest[r] = from[0];
    factor[r] = from[call.units * call.tokens];
  }
  float w[kOthers / 8][4], dw[kOthers / 8][4];
  for (int key = 0; key < call.tokens; key += kOthers) {
    query_weights(w, dw, call, item, tiles, key, highest, factor);
    for_elements(row, key, [&](int n, int j, int, int) { delta[j >> 1] += w[n][j] * dw[n][j]; });
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int q = row + (lane_id() >> 2) + 8 * r;
    delta[r] = quad_sum(delta[r]);
    if (q < call.tokens && item.part == 0 && (lane_id() & 3) == 0) {
      call.delta[item.unit * call.tokens + q] = delta[r];
    }
  }
  for (int key = 0; key < call.tokens; key += kOthers) {
    // The only keys are still at hand.
    if (call.tokens > kOthers) {
      query_weights(w, dw, call, item, tiles, key, highest, factor);
    }
    for_elements(row, key, [&](int n, int j, int, int) { w[n][j] *= dw[n][j] - delta[j >> 1]; });
    add_tokens(sums, w, tiles, tokens_of(call, item, 1), key, item.part);
  }
  DirectCall<T> to = call;
  to.qkv = call.grad_qkv;
  store_part(sums, tokens_of(to, item, 0), row, item.part, call.scale * kLn2);
}

// The gradients of k and v; rows are keys.
template <class T>
__global__ void __launch_bounds__(kDirectWarps * 32, 2) direct_keys(DirectCall<T> call) {
  SHARED_DYNAMIC(unsigned char, memory);
  const DirectTiles<T> tiles(memory);
  const DirectItem<T> item(call);
  if (item.unit >= call.units) return;
  const int row = item.tile * 16;
  const Tokens<T> grad_out = tokens_of(call, item, call.grad_out);
  float dk[kPartTiles][4] = {}, dv[kPartTiles][4] = {};
  for (int query = 0; query < call.tokens; query += kOthers) {
    float w[kOthers / 8][4], ds[kOthers / 8][4];
    head_products(w, tiles, tokens_of(call, item, 1), tokens_of(call, item, 0), row, query);
    head_products(ds, tiles, tokens_of(call, item, 2), grad_out, row, query);
    for_elements(row, query, [&](int n, int j, int k, int q) {
      if (q >= call.tokens || k >= call.tokens) {
        w[n][j] = ds[n][j] = 0;
        return;
      }
      const int64_t at = item.unit * call.tokens + q;
      const float keep = call.dropout.seed == nullptr
                             ? 1.0f
                             : keep_weight(call.dropout, item.unit, q, k, call.tokens);
      const float* const row_of = call.statistics + at;
      const float weight =
          ptx::exp2(w[n][j] * call.scale - row_of[0]) * row_of[call.units * call.tokens];
      ds[n][j] = weight * (ds[n][j] * keep - call.delta[at]);
      w[n][j] = weight * keep;
    });
    add_tokens(dv, w, tiles, grad_out, query, item.part);
    add_tokens(dk, ds, tiles, tokens_of(call, item, 0), query, item.part);
  }
  DirectCall<T> to = call;
  to.qkv = call.grad_qkv;
  store_part(dk, tokens_of(to, item, 1), row, item.part, call.scale * kLn2);
  store_part(dv, tokens_of(to, item, 2), row, item.part, 1.0f);
}

}  // namespace xattn::cpsa_cuda
