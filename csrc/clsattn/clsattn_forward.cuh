// Forward of CLS cross attention: one read of the tokens.
#pragma once

#include "clsattn_device.cuh"

namespace xattn::clsattn_cuda {

template <class T>
struct Forward : Inputs<T> {
  T* normed;         // [batch, C]: CLS through the norm
  T* keys;           // [batch, heads, C]: g u
  float* key_sums;   // [batch, heads]: of the channels of a key
  float* part_sums;  // [batch, parts, heads, C]: sum w t of a part
  float*
      part_stats;  // [batch, parts, heads, 3]: highest logit, sums of the weights and of those kept
  T* pooled;       // [batch, heads, C]: g z + s sum w
  float* shares;   // [batch, heads]: sum w
};
enum Stat { kTop, kTotal, kShare, kStats };

// CLS through the norm, an image a warp; `moments`: mean and rstd go to the state too.
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_cls(const Inputs<T> in, T* __restrict__ normed, bool moments) {
  const int64_t b = warp_of_grid();
  if (b >= in.batch) return;
  const T* x = in.token(b, 0);
  const Moments m = token_moments(x, in.channels, in.eps);
  for (int c = lane_id(); c < in.channels; c += 32) {
    const float t = (to_float(x[c]) - m.mean) * m.rstd;
    normed[b * in.channels + c] = from_float<T>(t * in.gain(c) + in.shift(c));
  }
  if (moments && lane_id() == 0) {
    *in.means(b) = m.mean;
    *in.rstds(b) = m.rstd;
  }
}

// keys and key_sums, a head of an image a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_keys(const Forward<T> in) {
  const int64_t unit = warp_of_grid();
  if (unit >= in.batch * in.heads) return;
  const float* u = in.u(unit);
  float sum = 0;
  for (int c = lane_id(); c < in.channels; c += 32) {
    const T key = from_float<T>(u[c] * in.gain(c));
    in.keys[unit * in.channels + c] = key;
    sum += to_float(key);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) in.key_sums[unit] = sum;
}

// Shared memory of `pool`; kGroups: of 8 heads.
template <class T, int kGroups>
struct PoolMemory {
  int stride;
  T *x, *keys, *weights;      // [stages][kTokens][stride]; [8 kGroups][stride]; of the tile
  float *products, *spreads;  // of each half of the channels: [8 kGroups][kTokens]; [2][kTokens]
  float* factors;             // [8 kGroups]: of what was summed before; then the sums of w mean
  int bytes;

  __host__ __device__ PoolMemory(int channels, int stages, void* memory) : stride(channels + 8) {
    Memory m{static_cast<char*>(memory)};
    x = m.take<T>(stages * kTokens * stride);
    keys = m.take<T>(8 * kGroups * stride);
    weights = m.take<T>(8 * kGroups * kCoefficients);
    products = m.take<float>(2 * 8 * kGroups * kProducts);
    spreads = m.take<float>(2 * 2 * kTokens);
    factors = m.take<float>(8 * kGroups);
    bytes = static_cast<int>(m.next - static_cast<char*>(memory));
  }
};

// Sums of what a lane sees of the tokens g and g + 8 while their channels pass: relative to the
// mean of the first four, so that little cancels.
struct LaneSpread {
  float near[2], sum[2] = {}, square[2] = {};

  template <class T>
  XATTN_DEVICE void add(const FragmentA<T>& a, bool first) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float v[4];
      values_of(a, row, v);
      if (first) near[row] = (v[0] + v[1] + v[2] + v[3]) / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float apart = v[i] - near[row];
        sum[row] += apart;
        square[row] += apart * apart;
      }
    }
  }

  // Of all `steps` of the four lanes of a row, into spreads [2][kTokens].
  XATTN_DEVICE void store(float* spreads, int steps) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Spread s{4.0f * steps, 0, 0};
      if (steps > 0) {
        const float mean = sum[row] / s.count;
        s.mean = near[row] + mean;
        s.square = square[row] - mean * sum[row];
      }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {  // equal counts: order does not matter
        const float mean = __shfl_xor_sync(kWholeWarp, s.mean, distance);
        const float square = __shfl_xor_sync(kWholeWarp, s.square, distance);
        const float apart = mean - s.mean;
        s = {2 * s.count, (s.mean + mean) / 2, s.square + square + apart * apart * s.count / 2};
      }
      if (lane_id() % 4 == 0) {
        float* to = spreads + lane_id() / 4 + row * 8;
        to[0] = s.mean;
        to[kTokens] = s.square;
      }
    }
  }
};

// Products of a tile with the keys, and with a norm the spread of its tokens.
template <class T, int kGroups>
XATTN_DEVICE void multiply_keys(const PoolMemory<T, kGroups>& m, const T* x, const Share& share,
                                bool norm) {
  float s[kGroups][4] = {};
  LaneSpread spread;
#pragma unroll 2
  for (int step = share.begin; step < share.end; ++step) {
    FragmentA<T> tokens;
    load_a(tokens, x + share.token * m.stride + step * 16, m.stride);
    FragmentB<T> keys[kGroups];
    if constexpr (kGroups == 1) {
      load_b(keys[0], m.keys + step * 16, m.stride);
    } else {
      load_b_pair(keys, m.keys + step * 16, m.stride);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) multiply_add(s[i], tokens, keys[i]);
    if (norm) spread.add(tokens, step == share.begin);
  }
  store_products(m.products, s, share);
  if (norm)
    spread.store(m.spreads + share.half * 2 * kTokens + share.token, share.end - share.begin);
}

// The softmax of a warp's heads, warp, warp + kWarps ..: lanes are the tokens of a tile.
template <int kHeads>
struct Softmax {
  float highest[kHeads], key_sum[kHeads];  // the same in all lanes
  float total[kHeads], kept[kHeads];       // of a lane's tokens: sums of the weights, of those kept
  float means[kHeads];                     // and of w mean
};

// Weights of a tile relative to the highest logit so far, divided by the token's deviation.
template <class T, int kGroups>
XATTN_DEVICE void weigh(const Forward<T>& in, const PoolMemory<T, kGroups>& m,
                        Softmax<2 * kGroups>& state, int64_t b, int n, bool inside, float unit) {
  const int t = lane_id(), steps = in.channels / 16;
  float mean = 0, rstd = 1;
  if (in.norm_weight) {
    const float* other = m.spreads + 2 * kTokens;
    const Spread spread = join({16.0f * (steps / 2), m.spreads[t], m.spreads[kTokens + t]},
                               {16.0f * (steps - steps / 2), other[t], other[kTokens + t]});
    if (inside) {
      mean = spread.mean;
      rstd = 1 / sqrtf(spread.square / in.channels + in.eps);
      if (threadIdx.x < 32 && n > 0) {
        in.means(b)[n] = mean;
        in.rstds(b)[n] = rstd;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const int h = threadIdx.x / 32 + i * kWarps;
    if (h >= in.heads) break;
    const float* product = m.products + h * kProducts + t;
    const float whole = product[0] + product[8 * kGroups * kProducts];
    float logit = (whole - state.key_sum[i] * mean) * rstd * (in.scale * kLog2e);
    if (!inside) logit = -INFINITY;
    const float above = fmaxf(state.highest[i], warp_max(logit));
    const float factor = ptx::exp2(state.highest[i] - above);
    float w = ptx::exp2(logit - above);
    state.highest[i] = above;
    state.total[i] = state.total[i] * factor + w;
    if (in.dropout.seed) {
      w *= in.keep(b * in.heads + h, n);
      state.kept[i] = state.kept[i] * factor + w;
    }
    const T rounded = from_float<T>(w * (rstd / unit));
    state.means[i] = state.means[i] * factor + to_float(rounded) * mean;
    m.weights[h * kCoefficients + t] = rounded;
    if (t == 0) m.factors[h] = factor;
  }
}

// sums [16 channels][8 heads] of each tile = factors sums + x^T weights.
template <class T, int kTiles, int kGroups>
XATTN_DEVICE void add_tokens(const PoolMemory<T, kGroups>& m, const T* x, const Channels& own,
                             float (&sums)[kTiles][kGroups][4]) {
  FragmentB<T> weights[kGroups][2];  // of 16 tokens
  float factors[kGroups][2];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_b(weights[i][j], m.weights + i * 8 * kCoefficients + j * 16, kCoefficients);
      factors[i][j] = m.factors[i * 8 + lane_id() % 4 * 2 + j];
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= own.count) break;
#pragma unroll
    for (int i = 0; i < kGroups * 4; ++i) sums[tile][i / 4][i % 4] *= factors[i / 4][i % 2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      FragmentA<T> tokens;
      load_a_transposed(tokens, x + j * 16 * m.stride + (own.first + tile) * 16, m.stride);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) multiply_add(sums[tile][i], tokens, weights[i][j]);
    }
  }
}

// What a part adds up: part_stats, and into m.factors the sums of w mean.
template <class T, int kGroups>
XATTN_DEVICE void store_stats(const Forward<T>& in, const PoolMemory<T, kGroups>& m,
                              const Softmax<2 * kGroups>& state) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const int h = threadIdx.x / 32 + i * kWarps;
    if (h >= in.heads) break;
    const float total = warp_sum(state.total[i]), kept = warp_sum(state.kept[i]);
    const float means = warp_sum(state.means[i]);
    if (lane_id() > 0) continue;
    float* stats = in.part_stats + (int64_t{blockIdx.x} * in.heads + h) * kStats;
    stats[kTop] = state.highest[i];
    stats[kTotal] = total;
    stats[kShare] = in.dropout.seed ? kept : total;
    m.factors[h] = means;
  }
}

// Logits, softmax and weighted sum of a part of the tokens of an image: a block. kTiles: of 16
// channels that a warp sums; kGroups: of 8 heads.
template <class T, int kTiles, int kGroups>
__global__ void __launch_bounds__(kThreads) pool(const Forward<T> in, int stages) {
  SHARED_DYNAMIC(char, memory);
  const PoolMemory<T, kGroups> m(in.channels, stages, memory);
  const TokenTiles<T> tiles(in, m.x, m.stride, stages);
  const int64_t b = tiles.b;
  tiles.load(tiles.begin);
  load_rows(m.keys, m.stride, in.keys + b * in.heads * in.channels, in.heads, 8 * kGroups,
            in.channels);
  ptx::cp_async_commit();

  for (int i = threadIdx.x; i < 8 * kGroups * kCoefficients; i += kThreads) {
    m.weights[i] = from_float<T>(0.0f);  // of heads that there are not
  }
  if (threadIdx.x < 8 * kGroups) m.factors[threadIdx.x] = 0;
  Softmax<2 * kGroups> state;
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const int h = threadIdx.x / 32 + i * kWarps;
    state.highest[i] = -INFINITY;
    state.total[i] = state.kept[i] = state.means[i] = 0;
    state.key_sum[i] = h < in.heads ? in.key_sums[b * in.heads + h] : 0.0f;
  }
  const float unit = in.unit_rstd(b);
  const Share share(in.channels);
  const Channels own(in.channels);
  float sums[kTiles][kGroups][4] = {};

  for (int first = tiles.begin; first < tiles.end; first += kTokens) {
    const T* const x = tiles.next(first);
    multiply_keys(m, x, share, in.norm_weight != nullptr);
    __syncthreads();
    const int n = first + lane_id();
    weigh(in, m, state, b, n, n < tiles.end, unit);
    __syncthreads();
    add_tokens(m, x, own, sums);
  }
  __syncthreads();  // m.factors is free
  store_stats(in, m, state);
  __syncthreads();
  store_sums(in.part_sums + int64_t{blockIdx.x} * in.heads * in.channels, sums, own, m.factors,
             unit, in.heads, in.channels);
}

// One softmax of the parts: z and what follows from it, kThreads channels of a head of an image a
// block.
template <class T>
__global__ void __launch_bounds__(kThreads) join_parts(const Forward<T> in) {
  const int blocks = (in.channels + kThreads - 1) / kThreads;
  const int64_t unit = blockIdx.x / blocks, b = unit / in.heads;
  const int h = static_cast<int>(unit % in.heads);
  const float* stats = in.part_stats + (b * in.parts * in.heads + h) * kStats;
  const int step = in.heads * kStats;  // to the next part
  float top = stats[kTop], total = 0, share = 0;
  for (int part = 1; part < in.parts; ++part) top = fmaxf(top, stats[part * step + kTop]);
  for (int part = 0; part < in.parts; ++part) {
    const float level = ptx::exp2(stats[part * step + kTop] - top);
    total += level * stats[part * step + kTotal];
    share += level * stats[part * step + kShare];
  }
  share /= total;

  const int block = blockIdx.x % blocks, c = block * kThreads + threadIdx.x;
  if (c < in.channels) {
    const float* sums = in.part_sums + (b * in.parts * in.heads + h) * in.channels + c;
    float z = 0;
    for (int part = 0; part < in.parts; ++part) {
      const float level = ptx::exp2(stats[part * step + kTop] - top);
      z += level * sums[part * int64_t{in.heads} * in.channels];
    }
    z /= total;
    in.z(unit)[c] = z;
    in.pooled[unit * in.channels + c] = from_float<T>(z * in.gain(c) + in.shift(c) * share);
  }
  if (block > 0) return;
  float* line = in.line(b, h);
  for (int n = threadIdx.x; n < in.tokens; n += kThreads) {
    line[n] = n == 0 ? top + log2f(total) : n == 1 ? share : 0.0f;
  }
  if (threadIdx.x == 0) in.shares[unit] = share;
}

}  // namespace xattn::clsattn_cuda
