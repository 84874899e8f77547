// Backward of CLS cross attention: one read of the tokens, one write of their gradients.
// clsattn_backward.cuh has the equations.
#pragma once

#include "clsattn_backward.cuh"

namespace xattn::clsattn_cuda {

// Shared memory of `backward_tokens`; kGroups: of 8 heads.
template <class T, int kGroups>
struct BackwardMemory {
  static constexpr int kHeads = 8 * kGroups;
  int stride;
  T *x, *rows, *weights;  // as of the forward; [2 kHeads][stride]; [3 kHeads][kCoefficients]:
                          // w m, ds, and ds divided by the token's deviation
  float* products;        // of each half of the channels: [2 kHeads][kProducts]
  float* moments;         // [2][kTokens]: mean, rstd
  float* inner;           // [kWarps][2][kTokens]: sums over channels of dt and dt t
  float* numbers;         // [kHeads][kNumbers]
  float* means;           // [kHeads]: sums of ds mean / deviation
  int bytes;

  __host__ __device__ BackwardMemory(int channels, int stages, void* memory)
      : stride(channels + 8) {
    Memory m{static_cast<char*>(memory)};
    x = m.take<T>(stages * kTokens * stride);
    rows = m.take<T>(2 * kHeads * stride);
    weights = m.take<T>(3 * kHeads * kCoefficients);
    products = m.take<float>(2 * 2 * kHeads * kProducts);
    moments = m.take<float>(2 * kTokens);
    inner = m.take<float>(kWarps * 2 * kTokens);
    numbers = m.take<float>(kHeads * kNumbers);
    means = m.take<float>(kHeads);
    bytes = static_cast<int>(m.next - static_cast<char*>(memory));
  }
};

// Products of a tile with g dz and g u.
template <class T, int kGroups>
XATTN_DEVICE void multiply_rows(const BackwardMemory<T, kGroups>& m, const T* x,
                                const Share& share) {
  float s[2 * kGroups][4] = {};
#pragma unroll 2
  for (int step = share.begin; step < share.end; ++step) {
    FragmentA<T> tokens;
    load_a(tokens, x + share.token * m.stride + step * 16, m.stride);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      FragmentB<T> rows[2];
      load_b_pair(rows, m.rows + i * 16 * m.stride + step * 16, m.stride);
      multiply_add(s[2 * i], tokens, rows[0]);
      multiply_add(s[2 * i + 1], tokens, rows[1]);
    }
  }
  store_products(m.products, s, share);
}

// weights of a tile, from its products: lanes are its tokens, and a warp takes the heads warp,
// warp + kWarps ..; means, ds_sums: what each adds to the sums of ds mean / deviation and of ds.
template <class T, int kGroups>
XATTN_DEVICE void weigh_grads(const Backward<T>& in, const BackwardMemory<T, kGroups>& m,
                              float (&means)[2 * kGroups], float (&ds_sums)[2 * kGroups], int64_t b,
                              int n, bool inside, Moments own, float unit) {
  constexpr int kHeads = 8 * kGroups;
  const int t = lane_id(), warp = threadIdx.x / 32;
  float plain = 0, along = 0;
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const int h = warp + i * kWarps;
    if (h >= in.heads) break;
    const float* number = m.numbers + h * kNumbers;
    const float *grad = m.products + h * kProducts + t, *key = grad + kHeads * kProducts;
    constexpr int kOther = 2 * kHeads * kProducts;  // the other half of the channels
    const float dw = (grad[0] + grad[kOther] - number[kGradSum] * own.mean) * own.rstd;
    const float logit = (key[0] + key[kOther] - number[kKeySum] * own.mean) * own.rstd;
    const float keep = in.keep(b * in.heads + h, n);
    Coefficients c =
        coefficients(dw, logit, keep, in.scale, number[kDelta], number[kConstant], number[kLogSum]);
    if (!inside) c = {0, 0};
    const T kept = from_float<T>(c.kept), ds = from_float<T>(c.ds);
    const T scaled = from_float<T>(c.ds * (own.rstd / unit));
    plain += to_float(kept) * number[kGradSum] + to_float(ds) * number[kKeySum];
    along += to_float(kept) * dw + to_float(ds) * logit;
    means[i] += to_float(scaled) * own.mean;
    ds_sums[i] += to_float(scaled) * (unit / own.rstd);
    T* to = m.weights + h * kCoefficients + t;
    to[0] = kept;
    to[kHeads * kCoefficients] = ds;
    to[2 * kHeads * kCoefficients] = scaled;
  }
  m.inner[warp * 2 * kTokens + t] = plain;
  m.inner[(warp * 2 + 1) * kTokens + t] = along;
  if (warp == 0) {
    m.moments[t] = own.mean;
    m.moments[kTokens + t] = own.rstd;
  }
}

// What the norm makes of dt of one token: (dt - plain) rstd - (x - mean) slope.
struct NormBackward {
  float mean, rstd, plain, slope;

  XATTN_DEVICE void load(const float* moments, const float* inner, int token, int channels) {
    float along = plain = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      plain += inner[warp * 2 * kTokens + token];
      along += inner[(warp * 2 + 1) * kTokens + token];
    }
    mean = moments[token];
    rstd = moments[kTokens + token];
    plain /= channels;
    slope = along / channels * rstd * rstd;
  }
  XATTN_DEVICE float of(float dt, float x) const {
    return (dt - plain) * rstd - (x - mean) * slope;
  }
};

// dt [2 x 16 tokens][2 x 8 channels] to gradients, in place of the tokens in x; the first row is
// CLS where cls is not null.
template <class T>
XATTN_DEVICE void replace_tokens(T* x, int stride, const float (&dt)[2][2][4],
                                 const NormBackward (&norm)[2][2], bool normed, float* cls) {
  const int g = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int rows = i / 4, low = i / 2 % 2, columns = i % 2;  // low: rows g + 8
    const float* pair = dt[rows][columns] + low * 2;
    auto* at =
        reinterpret_cast<Pack<T, 2>*>(x + (rows * 16 + low * 8 + g) * stride + columns * 8 + c);
    const Pack<T, 2> token = *at;
    float grad[2] = {pair[0], pair[1]};
    if (cls && rows == 0 && low == 0 && g == 0) {
      cls[columns * 8 + c] = grad[0];
      cls[columns * 8 + c + 1] = grad[1];
    }
    if (normed) {
      grad[0] = norm[rows][low].of(grad[0], to_float(token.v[0]));
      grad[1] = norm[rows][low].of(grad[1], to_float(token.v[1]));
    }
    *at = {{from_float<T>(grad[0]), from_float<T>(grad[1])}};
  }
}

// sums [16 channels][8 heads] += x^T ds, and the gradients of the tokens in their place, for the
// channels of this warp.
template <class T, int kTiles, int kGroups>
XATTN_DEVICE void add_grads(const BackwardMemory<T, kGroups>& m, T* x, const Channels& own,
                            int channels, bool normed, float* cls,
                            float (&sums)[kTiles][kGroups][4]) {
  FragmentA<T> weights[2][kGroups];  // [16 tokens][16 rows]
  FragmentB<T> ds[kGroups][2];
  NormBackward norm[2][2];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const T* scaled = m.weights + (2 * kGroups + i) * 8 * kCoefficients;
      load_b(ds[i][j], scaled + j * 16, kCoefficients);
      load_a_transposed(weights[j][i], m.weights + i * 16 * kCoefficients + j * 16, kCoefficients);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    norm[i / 2][i % 2].load(m.moments, m.inner, i * 8 + lane_id() / 4, channels);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= own.count) break;
    const int first = (own.first + tile) * 16;
    float dt[2][2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      FragmentA<T> tokens;
      load_a_transposed(tokens, x + j * 16 * m.stride + first, m.stride);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) multiply_add(sums[tile][i], tokens, ds[i][j]);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      FragmentB<T> rows[2];
      load_b_pair_transposed(rows, m.rows + i * 16 * m.stride + first, m.stride);
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_add(dt[j / 2][j % 2], weights[j / 2][i], rows[j % 2]);
    }
    __syncwarp();  // all lanes have their tokens
    replace_tokens(x + first, m.stride, dt, norm, normed, cls ? cls + first : nullptr);
  }
}

// The channels of this warp from x to the gradients of tokens first .. end - 1, CLS left out.
template <class T>
XATTN_DEVICE void store_grads(const Backward<T>& in, const T* x, int stride, const Channels& own,
                              int64_t b, int first, int end) {
  constexpr int kPiece = 16 / sizeof(T);
  const int from = own.first * 16, to = from + own.count * 16;
  for (int r = lane_id() / 4; r < kTokens; r += 8) {
    const int n = first + r;
    if (n == 0 || n >= end) continue;
    T* grads = in.grad_patches + (b * (in.tokens - 1) + n - 1) * in.channels;
    for (int c = from + lane_id() % 4 * kPiece; c < to; c += 4 * kPiece) {
      using Piece = Pack<T, kPiece>;
      *reinterpret_cast<Piece*>(grads + c) = *reinterpret_cast<const Piece*>(x + r * stride + c);
    }
  }
}

// Gradients of a part of the tokens of an image, and its share of sum ds t: a block, as `pool`.
template <class T, int kTiles, int kGroups>
__global__ void __launch_bounds__(kThreads) backward_tokens(const Backward<T> in, int stages) {
  SHARED_DYNAMIC(char, memory);
  constexpr int kHeads = 8 * kGroups;
  const BackwardMemory<T, kGroups> m(in.channels, stages, memory);
  const TokenTiles<T> tiles(in, m.x, m.stride, stages);
  const int64_t b = tiles.b;
  const T* rows = in.rows + b * 2 * in.heads * in.channels;
  tiles.load(tiles.begin);
  load_rows(m.rows, m.stride, rows, in.heads, kHeads, in.channels);
  load_rows(m.rows + kHeads * m.stride, m.stride, rows + int64_t{in.heads} * in.channels, in.heads,
            kHeads, in.channels);
  ptx::cp_async_commit();

  for (int i = threadIdx.x; i < 3 * kHeads * kCoefficients; i += kThreads) {
    m.weights[i] = from_float<T>(0.0f);  // of heads that there are not
  }
  for (int i = threadIdx.x; i < in.heads * kNumbers; i += kThreads) {
    m.numbers[i] = in.numbers[b * in.heads * kNumbers + i];
  }
  float means[2 * kGroups] = {}, ds_sums[2 * kGroups] = {};
  const bool normed = in.norm_weight != nullptr;
  const float unit = in.unit_rstd(b);
  const Share share(in.channels);
  const Channels own(in.channels);
  float sums[kTiles][kGroups][4] = {};

  for (int first = tiles.begin; first < tiles.end; first += kTokens) {
    const int n = first + lane_id();
    const bool inside = n < tiles.end;
    Moments moments{0, 1};
    if (normed && inside) moments = {in.means(b)[n], in.rstds(b)[n]};
    T* const x = tiles.next(first);
    multiply_rows(m, x, share);
    __syncthreads();
    weigh_grads(in, m, means, ds_sums, b, n, inside, moments, unit);
    __syncthreads();
    float* cls = first == 0 ? in.grad_token + b * in.channels : nullptr;
    add_grads(m, x, own, in.channels, normed, cls, sums);
    __syncwarp();
    store_grads(in, x, m.stride, own, b, first, tiles.end);
  }
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    const int h = threadIdx.x / 32 + i * kWarps;
    const float sum = warp_sum(means[i]), ds = warp_sum(ds_sums[i]);
    if (lane_id() > 0) continue;
    m.means[h] = sum;
    if (h < in.heads) in.part_ds[int64_t{blockIdx.x} * in.heads + h] = ds;
  }
  __syncthreads();
  store_sums(in.part_sums + int64_t{blockIdx.x} * in.heads * in.channels, sums, own, m.means, unit,
             in.heads, in.channels);
}

}  // namespace xattn::clsattn_cuda
