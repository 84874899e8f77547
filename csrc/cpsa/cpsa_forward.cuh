// Forward of cross-patch attention on CUDA, absorbed form: one head, no dropout.
//
// out = softmax2((X A + a) X^T) X B + b for the tokens X of a channel. A warp keeps 16 queries and
// all that is computed of them in registers, from X A to the result.
#pragma once

#include "cpsa_tile.cuh"

namespace xattn::cpsa_cuda {

template <class T>
struct ForwardCall {
  Geometry map;
  Map<const T> x;
  Map<T> out;
  Absorbed<T> weights;
  int items;   // that the blocks share out
  int groups;  // of channels
  int slots;   // few tokens: rows of a channel, a power of two; many: rows of keys in memory
  int slots_log2;
  int splits;  // many tokens: into how many runs of queries a group of channels is cut
};

// The weights in shared memory, in front of everything else.
template <class T>
struct SharedWeights {
  T *query, *result;
  float *query_bias, *result_bias;

  static constexpr int kBytes = 2 * kMatrix * sizeof(T) + 2 * kColumns * sizeof(float);
  static_assert(kBytes % 16 == 0);

  XATTN_DEVICE explicit SharedWeights(unsigned char* memory)
      : query(reinterpret_cast<T*>(memory)),
        result(query + kMatrix),
        query_bias(reinterpret_cast<float*>(result + kMatrix)),
        result_bias(query_bias + kColumns) {}
  XATTN_DEVICE T* rest() const { return reinterpret_cast<T*>(result_bias + kColumns); }

  XATTN_DEVICE void load(const Absorbed<T>& from, bool attends) const {
    copy_to_shared(result, from.result, kMatrix);
    copy_to_shared(result_bias, from.result_bias, kColumns);
    if (!attends) return;
    copy_to_shared(query, from.query, kMatrix);
    copy_to_shared(query_bias, from.query_bias, kColumns);
  }
};

// Sixteen queries' softmax over blocks of keys; a lane has rows g and g + 8.
template <class T>
struct OnlineSoftmax {
  float highest[2], total[2];
  float sums[kTiles][4];  // weights times keys

  XATTN_DEVICE OnlineSoftmax() : highest{-INFINITY, -INFINITY}, total{0, 0}, sums{} {}

  // s: the logits of 8 kCount keys, -inf for keys that do not count; keys: their rows.
  template <int kCount>
  XATTN_DEVICE void add(float (&s)[kCount][4], const T* keys) {
    float before[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = highest[r];
#pragma unroll
      for (int n = 0; n < kCount; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      top = quad_max(top);
      const float shift = top == -INFINITY ? 0 : top;  // lest -inf less -inf be NaN
      before[r] = ptx::exp2(highest[r] - shift);
      highest[r] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) {
          s[n][j] = ptx::exp2(s[n][j] - shift);
          sum += s[n][j];
        }
      }
      total[r] = total[r] * before[r] + sum;  // of this lane's keys
    }
    scale_rows(sums, before[0], before[1]);
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      multiply_step<false, false>(sums, as_a<T>(s[2 * k], s[2 * k + 1]), keys + 16 * k * kColumns,
                                  kColumns);
    }
  }

  XATTN_DEVICE void finish() { scale_rows(sums, 1 / quad_sum(total[0]), 1 / quad_sum(total[1])); }
};

// z -> z B + b.
template <class T>
XATTN_DEVICE Rows<T> project(const Rows<T>& z, const SharedWeights<T>& weights) {
  float o[kTiles][4];
  set_rows(o, weights.result_bias);
  multiply<false>(o, z, weights.result);
  Rows<T> result;
  result.set(o);
  return result;
}

// Rows of a tile with values that are not finite, from y = X A + a: bit g is row g.
XATTN_DEVICE unsigned strange_rows(const float (&y)[kTiles][4]) {
  float upper = 0, lower = 0;  // NaN where a value is not finite
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    upper += (y[n][0] + y[n][1]) * 0.0f;
    lower += (y[n][2] + y[n][3]) * 0.0f;
  }
  const unsigned lanes[2] = {__ballot_sync(kWholeWarp, upper != upper),
                             __ballot_sync(kWholeWarp, lower != lower)};
  unsigned rows = 0;
  if ((lanes[0] | lanes[1]) != 0) {
    for (int g = 0; g < 8; ++g) {
      rows |= (lanes[0] >> 4 * g & 15) != 0 ? 1u << g : 0;
      rows |= (lanes[1] >> 4 * g & 15) != 0 ? 256u << g : 0;
    }
  }
  return rows;
}

// All rows of the channels of which there is one among `rows`.
XATTN_DEVICE unsigned whole_channels(unsigned rows, int slots) {
  unsigned all = 0;
  for (int first = 0; first < 16; first += slots) {
    const unsigned channel = ((1u << slots) - 1) << first;
    all |= (rows & channel) != 0 ? channel : 0;
  }
  return all;
}

template <class T>
XATTN_DEVICE void set_whole_rows(T* tile, unsigned which, float value) {
  __syncwarp();  // the tile has been read, or written
  for (int i = lane_id(); i < 16 * kColumns; i += 32) {
    if (which >> i / kColumns & 1) tile[i] = from_float<T>(value);
  }
  __syncwarp();
}

// The result of one tile of 16 rows of channels of few tokens, instead of the tile.
template <class T>
XATTN_DEVICE void attend_tile(T* tile, const SharedWeights<T>& weights, unsigned seen, int slots,
                              bool attends) {
  Rows<T> x;
  x.load(tile);
  unsigned strange = 0;
  if (attends) {
    float y[kTiles][4];
    // Products with weights of zero would carry what is not finite from one channel into others of
    // the tile. Such channels are set to zero, for another try, and their results to NaN.
#pragma unroll 1
    for (;;) {
      set_rows(y, weights.query_bias);
      multiply<false>(y, x, weights.query);
      const unsigned rows = strange != 0 ? 0 : strange_rows(y);
      if (rows == 0) break;
      strange = whole_channels(rows, slots);
      set_whole_rows(tile, strange, 0);
      x.load(tile);
    }
    x.set(y);
    float s[2][4] = {};
    multiply<true>(s, x, tile);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!(seen >> i & 1)) s[i >> 2][i & 3] = -INFINITY;
    }
    OnlineSoftmax<T> softmax;
    softmax.add(s, tile);
    softmax.finish();
    x.set(softmax.sums);
  }
  const Rows<T> result = project(x, weights);
  __syncwarp();  // the tile has been read
  result.store(tile);
  if (strange != 0) set_whole_rows(tile, strange, NAN);
}

// Up to 16 tokens of a channel: a tile is 16 / slots channels, a block takes kWarps tiles.
template <class T>
__global__ void __launch_bounds__(kWarps<T> * 32, 2) forward_few(ForwardCall<T> call) {
  SHARED_DYNAMIC(unsigned char, memory);
  const SharedWeights<T> weights(memory);
  T* const planes = weights.rest();
  const bool attends = call.map.tokens > 1;
  weights.load(call.weights, attends);
  const unsigned seen = keys_seen(call.map.tokens, call.slots_log2);
  const int vectors_log2 = 4 - call.slots_log2, channels = kWarps<T> * 16 / call.slots;
  T* const tile = planes + warp_id() * 16 * kColumns;
  const int tile_channel = warp_id() * 16 / call.slots;
  for (int item = blockIdx.x; item < call.items; item += gridDim.x) {
    const int image = item / call.groups, channel = item % call.groups * channels;
    load_planes<kVector<T>>(call.map, call.x, image, channel, vectors_log2, 0, call.slots, planes);
    __syncthreads();
    if (channel + tile_channel < call.map.channels) {
      attend_tile(tile, weights, seen, call.slots, attends);
    }
    __syncthreads();
    store_planes<kVector<T>>(call.map, call.out, image, channel, vectors_log2, 0, call.slots,
                             planes);
    __syncthreads();
  }
}

constexpr int kKeys = 32;  // that a warp takes at a time where tokens are many

// The keys of `count` rows for 16 queries y.
template <class T>
XATTN_DEVICE void attend_keys(OnlineSoftmax<T>& softmax, const Rows<T>& y, const T* keys,
                              int count) {
  for (int first = 0; first < count; first += kKeys, keys += kKeys * kColumns) {
    float s[kKeys / 8][4] = {};
    multiply<true>(s, y, keys);
    if (count - first < kKeys) {
      const int column = (lane_id() & 3) * 2;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (first + 8 * n + column + (j & 1) >= count) s[n][j] = -INFINITY;
        }
      }
    }
    softmax.add(s, keys);
  }
}

// More tokens: a block takes a vector of channels, a warp one of these, 16 queries at a time. Keys
// lie in memory, all of them or one chunk of `slots` after the other.
template <class T>
__global__ void __launch_bounds__(kWarps<T> * 32, 2) forward_many(ForwardCall<T> call) {
  SHARED_DYNAMIC(unsigned char, memory);
  const SharedWeights<T> weights(memory);
  T* const stage = weights.rest();  // [channel, 16, kColumns]: queries, then results
  T* const planes = stage + kWarps<T> * 16 * kColumns;
  weights.load(call.weights, true);
  const Geometry& g = call.map;
  const int tiles = (g.tokens + 15) / 16;
  const bool streams = call.slots < g.tokens;
  T* const own = stage + warp_id() * 16 * kColumns;
  const T* const keys = planes + warp_id() * call.slots * kColumns;
  for (int item = blockIdx.x; item < call.items; item += gridDim.x) {
    const int split = item % call.splits, group = item / call.splits;
    const int image = group / call.groups, channel = group % call.groups * kVector<T>;
    if (!streams) load_planes<kVector<T>>(g, call.x, image, channel, 0, 0, call.slots, planes);
    const int end = static_cast<int>(int64_t{tiles} * (split + 1) / call.splits);
    for (int tile = static_cast<int>(int64_t{tiles} * split / call.splits); tile < end; ++tile) {
      if (streams) load_planes<kVector<T>>(g, call.x, image, channel, 0, tile * 16, 16, stage);
      __syncthreads();
      Rows<T> rows;
      rows.load(streams ? own : keys + tile * 16 * kColumns);
      float y[kTiles][4];
      set_rows(y, weights.query_bias);
      multiply<false>(y, rows, weights.query);
      rows.set(y);
      OnlineSoftmax<T> softmax;
      for (int first = 0; first < g.tokens; first += call.slots) {
        if (streams) {
          __syncthreads();  // the chunk before has been read
          load_planes<kVector<T>>(g, call.x, image, channel, 0, first, call.slots, planes);
          __syncthreads();
        }
        attend_keys(softmax, rows, keys, min(call.slots, g.tokens - first));
      }
      softmax.finish();
      rows.set(softmax.sums);
      rows = project(rows, weights);
      rows.store(own);
      __syncthreads();
      store_planes<kVector<T>>(g, call.out, image, channel, 0, tile * 16, 16, stage);
      __syncthreads();
    }
  }
}

}  // namespace xattn::cpsa_cuda
