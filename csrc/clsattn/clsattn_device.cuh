// CLS-query cross attention (CrossViT, section 3.3) on the GPU: what its kernels share.
//
// Of n(x) = g t + s (t: normalised tokens, g and s: the norm's weight and shift) a head needs
// u = q W_k, its key g u, and z = sum w t: logits are scale (g u) . t, and the output is
// W_v (g z + s sum w). k, v and the tokens t are never in memory: with mean and rstd of a token x,
// (g u) . t = ((g u) . x - mean sum(g u)) rstd.
#pragma once

#include "common/mma.cuh"
#include "common/philox.cuh"

namespace xattn::clsattn_cuda {

constexpr int kTokens = 32;  // of a tile: the lanes of a warp, two rows of products
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kCoefficients = kTokens + 8;  // stride of a row of weights of a tile
constexpr int kProducts = kTokens + 4;      // of a row of its logits: no bank conflicts

// What every stage reads. Channels are dense, strides in elements, weights contiguous; null: none.
template <class T>
struct Inputs {
  int64_t batch;
  int tokens;  // CLS and the patches
  int heads, head_dim, channels;
  int parts, per_part;  // the tokens of an image, cut
  float eps, scale;
  Dropout dropout;
  const T *cls, *patches;
  int64_t cls_stride, patches_stride[2];
  const T *norm_weight, *norm_bias;
  // The state: [batch, heads, D + 2C], q with its bias, u and z; [batch, heads (+ 2), tokens], of a
  // head the logarithm of the softmax's sum and the sum of the weights kept, then zeros, and with a
  // norm mean and rstd of each token. Logits and what belongs to them are in powers of two.
  float *head_state, *token_state;

  XATTN_DEVICE const T* token(int64_t b, int n) const {
    return n == 0 ? cls + b * cls_stride
                  : patches + b * patches_stride[0] + (n - 1) * patches_stride[1];
  }
  XATTN_DEVICE float* u(int64_t unit) const {  // unit: b * heads + h
    return head_state + unit * (head_dim + 2 * int64_t{channels}) + head_dim;
  }
  XATTN_DEVICE float* z(int64_t unit) const { return u(unit) + channels; }
  XATTN_DEVICE float* line(int64_t b, int row) const {
    return token_state + (b * (norm_weight ? heads + 2 : heads) + row) * tokens;
  }
  XATTN_DEVICE float* means(int64_t b) const { return line(b, heads); }
  XATTN_DEVICE float* rstds(int64_t b) const { return line(b, heads + 1); }
  XATTN_DEVICE float gain(int c) const { return norm_weight ? to_float(norm_weight[c]) : 1.0f; }
  XATTN_DEVICE float shift(int c) const { return norm_bias ? to_float(norm_bias[c]) : 0.0f; }
  // 1 / deviation of CLS, about that of all tokens: dividing by it keeps what is rounded in range.
  XATTN_DEVICE float unit_rstd(int64_t b) const { return norm_weight ? *rstds(b) : 1.0f; }
  XATTN_DEVICE float keep(int64_t unit, int n) const {
    return dropout.seed ? keep_weight(dropout, unit, 0, n, tokens) : 1.0f;
  }
};

// The warp of the grid, and its lane: kernels that give a warp one row.
XATTN_DEVICE int64_t warp_of_grid() { return blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; }

struct Moments {
  float mean, rstd;
};

// Of a token in global memory, by one warp.
template <class T>
XATTN_DEVICE Moments token_moments(const T* x, int channels, float eps) {
  float sum = 0, square = 0;
  for (int c = lane_id(); c < channels; c += 32) sum += to_float(x[c]);
  const float mean = warp_sum(sum) / channels;
  for (int c = lane_id(); c < channels; c += 32) {
    const float apart = to_float(x[c]) - mean;
    square += apart * apart;
  }
  return {mean, 1 / sqrtf(warp_sum(square) / channels + eps)};
}

// Moments of some of the channels of a token, joined with those of others (Chan et al., 1979).
struct Spread {
  float count, mean, square;  // square: of what is apart from the mean
};
XATTN_DEVICE Spread join(const Spread& a, const Spread& b) {
  const float count = a.count + b.count, apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.square + b.square + apart * apart * a.count * share};
}

// What a block takes: a part of the tokens of an image, in tiles. Of the tiles in shared memory,
// [stages][kTokens][stride], one is used while the next one, if there are two, is loaded.
template <class T>
struct TokenTiles {
  const Inputs<T>& in;
  T* x;
  int stride, stages;
  int64_t b;
  int begin, end;

  XATTN_DEVICE TokenTiles(const Inputs<T>& in, T* x, int stride, int stages)
      : in(in),
        x(x),
        stride(stride),
        stages(stages),
        b(blockIdx.x / in.parts),
        begin(blockIdx.x % in.parts * in.per_part),
        end(min(begin + in.per_part, in.tokens)) {}

  // Copies tokens `first` .. in the background, from `end` on zeros; to be committed.
  XATTN_DEVICE void load(int first) const {
    constexpr int kPiece = 16 / sizeof(T);
    T* to = tile(first);
    for (int r = threadIdx.x / 32; r < kTokens; r += kWarps) {
      const bool inside = first + r < end;
      const T* from = in.token(b, inside ? first + r : first);
      for (int c = lane_id() * kPiece; c < in.channels; c += 32 * kPiece) {
        ptx::cp_async<16>(to + r * stride + c, from + c, inside);
      }
    }
  }

  // The tile of tokens `first` .., once it is there; all threads have done with the one before.
  XATTN_DEVICE T* next(int first) const {
    if (stages == 1 && first > begin) {
      __syncthreads();
      load(first);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (stages > 1 && first + kTokens < end) {
      load(first + kTokens);
      ptx::cp_async_commit();
    }
    return tile(first);
  }

 private:
  XATTN_DEVICE T* tile(int first) const {
    return x + ((first - begin) / kTokens & (stages - 1)) * kTokens * stride;
  }
};

// `count` rows of channels, then zeros up to `padded`.
template <class T>
XATTN_DEVICE void load_rows(T* to, int stride, const T* rows, int count, int padded, int channels) {
  constexpr int kPiece = 16 / sizeof(T);
  for (int r = threadIdx.x / 32; r < padded; r += kWarps) {
    const T* from = rows + (r < count ? r : 0) * int64_t{channels};
    for (int c = lane_id() * kPiece; c < channels; c += 32 * kPiece) {
      ptx::cp_async<16>(to + r * stride + c, from + c, r < count);
    }
  }
}

// A warp takes 16 tokens of a tile and half of the channels for the products with rows of heads.
struct Share {
  int token, half;  // first token; which half
  int begin, end;   // steps of 16 channels
  XATTN_DEVICE explicit Share(int channels) {
    const int warp = threadIdx.x / 32, steps = channels / 16;
    token = warp % 2 * 16;
    half = warp / 2;
    begin = half * steps / 2;
    end = (half + 1) * steps / 2;
  }
};

// What a lane holds of row g (row = 0) or g + 8 (row = 1) of a fragment.
template <class T>
XATTN_DEVICE void values_of(const FragmentA<T>& a, int row, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kIsShort<T>) {
      Pack<T, 2> pair;
      memcpy(&pair, &a.pairs[row + 2 * i], 4);
      v[2 * i] = to_float(pair.v[0]);
      v[2 * i + 1] = to_float(pair.v[1]);
    } else {
      v[2 * i] = a.pairs[row + 2 * i][0];
      v[2 * i + 1] = a.pairs[row + 2 * i][1];
    }
  }
}

// products [halves of the channels][kGroups x 8 rows][kTokens], from the fragments of a warp.
template <int kGroups>
XATTN_DEVICE void store_products(float* products, const float (&s)[kGroups][4],
                                 const Share& share) {
  const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    float* to = products + (share.half * kGroups * 8 + i * 8 + c) * kProducts + share.token + g;
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j % 2 * kProducts + j / 2 * 8] = s[i][j];
  }
}

// The channels whose sums over the tokens are a warp's.
struct Channels {
  int first, count;  // tiles of 16
  XATTN_DEVICE explicit Channels(int channels) {
    const int all = channels / 16, each = (all + kWarps - 1) / kWarps;
    first = threadIdx.x / 32 * each;
    count = min(each, max(all - first, 0));
  }
};

// part_sums [heads][channels] of a part = (sums - means) unit, from the fragments of its warps.
template <int kTiles, int kGroups>
XATTN_DEVICE void store_sums(float* part_sums, const float (&sums)[kTiles][kGroups][4],
                             const Channels& own, const float* means, float unit, int heads,
                             int channels) {
  const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i >= own.count) break;
#pragma unroll
    for (int j = 0; j < kGroups * 4; ++j) {
      const int h = j / 4 * 8 + c + j % 2;
      if (h >= heads) continue;
      float* to = part_sums + h * int64_t{channels} + (own.first + i) * 16 + g;
      to[j % 4 / 2 * 8] = (sums[i][j / 4][j % 4] - means[h]) * unit;
    }
  }
}

// Hands out a block's shared memory; from null on the host it tells how much there must be.
struct Memory {
  char* next;
  template <class V>
  __host__ __device__ V* take(int count) {
    char* const taken = next;
    next += (count * sizeof(V) + 15) / 16 * 16;
    return reinterpret_cast<V*>(taken);
  }
};

}  // namespace xattn::clsattn_cuda
