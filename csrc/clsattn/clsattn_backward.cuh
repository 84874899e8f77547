// Backward of CLS cross attention: one read of the tokens, one write of their gradients.
//
// With dz = W_v^T grad_out of a head and m the dropout factors:
//   dw = m (g dz . t + c),  c = dz . s + grad_out . b_v, left out where nothing is dropped: the
//   softmax does not see what is the same for all tokens;
//   ds = scale w (dw - delta),  delta = g dz . z + c sum w m,  du = g sum ds t,
//   dt = sum over heads (w m g dz + ds g u).
#pragma once

#include "clsattn_device.cuh"

namespace xattn::clsattn_cuda {

template <class T>
struct Backward : Inputs<T> {
  const T *grad_out, *v_bias;  // [batch, C], [C] or null
  int64_t grad_out_stride;
  const float* dz;    // [batch, heads, C]
  T* rows;            // [batch, 2 heads, C]: g dz, then g u
  float* numbers;     // [batch, heads, kNumbers]
  const T* normed;    // [batch, C]: CLS through the norm
  T* pooled;          // [batch, heads, C]: g z + s sum w m
  float* values;      // [batch, C]: grad_out sum w m
  float* part_sums;   // [batch, parts, heads, C]: sum ds t of a part
  float* part_ds;     // [batch, parts, heads]: sum ds of a part, zero but for rounding
  T* grad_patches;    // [batch, tokens - 1, C]
  float* grad_token;  // [batch, C]: dt of CLS, which waits for what comes by way of the query
  T* du;              // [batch, heads, C]
  float *by_gain, *by_shift;  // [batch, C]: of the norm's weight and shift; null without a norm
  const float* by_query;      // [batch, C]: of n(CLS) by way of the query
  T* grad_cls;                // [batch, C]
};
// Of a head of an image: sums of the channels of g dz and g u, delta, c, and from the state.
enum Number { kGradSum, kKeySum, kDelta, kConstant, kKept, kLogSum, kNumbers };

// rows, numbers, pooled and values: a head of an image a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_grads(const Backward<T> in) {
  const int64_t unit = warp_of_grid();
  if (unit >= in.batch * in.heads) return;
  const int64_t b = unit / in.heads;
  const int h = static_cast<int>(unit % in.heads), channels = in.channels;
  const float log_sum = in.line(b, h)[0], kept = in.line(b, h)[1];
  const float *u = in.u(unit), *z = in.z(unit), *dz = in.dz + unit * channels;
  T* grads = in.rows + (b * 2 * in.heads + h) * channels;
  T* keys = grads + int64_t{in.heads} * channels;
  float grad_sum = 0, key_sum = 0, delta = 0, constant = 0;
  for (int c = lane_id(); c < channels; c += 32) {
    const float gain = in.gain(c), shift = in.shift(c);
    const T grad = from_float<T>(dz[c] * gain), key = from_float<T>(u[c] * gain);
    grads[c] = grad;
    keys[c] = key;
    in.pooled[unit * channels + c] = from_float<T>(z[c] * gain + shift * kept);
    grad_sum += to_float(grad);
    key_sum += to_float(key);
    delta += to_float(grad) * z[c];
    constant += dz[c] * shift;
  }
  for (int d = h * in.head_dim + lane_id(); d < (h + 1) * in.head_dim; d += 32) {
    const float grad = to_float(in.grad_out[b * in.grad_out_stride + d]);
    if (in.v_bias) constant += grad * to_float(in.v_bias[d]);
    in.values[b * channels + d] = grad * kept;
  }
  constant = in.dropout.seed ? warp_sum(constant) : 0.0f;
  grad_sum = warp_sum(grad_sum);
  key_sum = warp_sum(key_sum);
  delta = warp_sum(delta) + constant * kept;
  if (lane_id() > 0) return;
  float* numbers = in.numbers + unit * kNumbers;
  numbers[kGradSum] = grad_sum;
  numbers[kKeySum] = key_sum;
  numbers[kDelta] = delta;
  numbers[kConstant] = constant;
  numbers[kKept] = kept;
  numbers[kLogSum] = log_sum;
}

// Of one weight: what dz and u are multiplied by in dt.
struct Coefficients {
  float kept, ds;
};
// dw, logit: the products of the normalised token with g dz and g u.
XATTN_DEVICE Coefficients coefficients(float dw, float logit, float keep, float scale, float delta,
                                       float constant, float log_sum) {
  const float w = ptx::exp2(logit * (scale * kLog2e) - log_sum);
  return {w * keep, w * ((dw + constant) * keep - delta) * scale};
}

// Shared memory of `backward_tokens`; kGroups: of 8 heads.
template <class T, int kGroups>
struct BackwardMemory {
  static constexpr int kHeads = 8 * kGroups;
  int stride;
  T *x[2], *rows, *weights;  // as of the forward; [2 kHeads][stride]; [3 kHeads][kCoefficients]:
                             // w m, ds, and ds divided by the token's deviation
  float* products;           // of each half of the channels: [2 kHeads][kProducts]
  float* moments;            // [2][kTokens]: mean, rstd
  float* inner;              // [kWarps][2][kTokens]: sums over channels of dt and dt t
  float* numbers;            // [kHeads][kNumbers]
  float* means;              // [kHeads]: sums of ds mean / deviation
  int bytes;

  __host__ __device__ BackwardMemory(int channels, int stages, void* memory)
      : stride(channels + 8) {
    Memory m{static_cast<char*>(memory)};
    x[0] = m.take<T>(kTokens * stride);
    x[1] = stages > 1 ? m.take<T>(kTokens * stride) : x[0];
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
  const int64_t b = blockIdx.x / in.parts;
  const int begin = blockIdx.x % in.parts * in.per_part;
  const int end = min(begin + in.per_part, in.tokens);
  const T* rows = in.rows + b * 2 * in.heads * in.channels;
  load_tokens(in, m.x[0], m.stride, b, begin, end);
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

  for (int first = begin, stage = 0; first < end; first += kTokens, stage ^= 1) {
    if (stages == 1 && first > begin) {
      __syncthreads();  // all have stored the tile before
      load_tokens(in, m.x[0], m.stride, b, first, end);
      ptx::cp_async_commit();
    }
    const int n = first + lane_id();
    Moments moments{0, 1};
    if (normed && n < end) moments = {in.means(b)[n], in.rstds(b)[n]};
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (stages > 1 && first + kTokens < end) {
      load_tokens(in, m.x[stage ^ 1], m.stride, b, first + kTokens, end);
      ptx::cp_async_commit();
    }
    multiply_rows(m, m.x[stage], share);
    __syncthreads();
    weigh_grads(in, m, means, ds_sums, b, n, n < end, moments, unit);
    __syncthreads();
    float* cls = first == 0 ? in.grad_token + b * in.channels : nullptr;
    add_grads(m, m.x[stage], own, in.channels, normed, cls, sums);
    __syncwarp();
    store_grads(in, m.x[stage], m.stride, own, b, first, end);
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

// du of all heads, and what the norm gets by way of them: a channel of an image a thread. The ds of
// a head add up to zero. What rounding leaves is mostly an error of delta, the same for all tokens
// in proportion to their weights, and is taken back: it would outweigh ds where one token has them
// all.
template <class T>
__global__ void __launch_bounds__(kThreads) join_grads(const Backward<T> in) {
  const int blocks = (in.channels + kThreads - 1) / kThreads;
  const int64_t b = blockIdx.x / blocks, row = int64_t{in.heads} * in.channels;
  const int c = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (c >= in.channels) return;
  const float gain = in.gain(c);
  float by_gain = 0, by_shift = 0;
  for (int h = 0; h < in.heads; ++h) {
    const int64_t unit = b * in.heads + h, at = unit * in.channels + c;
    const float* sums = in.part_sums + (b * in.parts * in.heads + h) * in.channels + c;
    const float kept = in.numbers[unit * kNumbers + kKept], z = in.z(unit)[c];
    float sum = 0, ds = 0;
    for (int part = 0; part < in.parts; ++part) {
      sum += sums[part * row];
      ds += in.part_ds[(b * in.parts + part) * in.heads + h];
    }
    if (kept != 0) sum -= ds * (z / kept);
    in.du[at] = from_float<T>(sum * gain);
    by_gain += in.dz[at] * z + in.u(unit)[c] * sum;
    by_shift += in.dz[at] * kept;
  }
  if (in.by_gain) {
    in.by_gain[b * in.channels + c] = by_gain;
    in.by_shift[b * in.channels + c] = by_shift;
  }
}

// The gradient of CLS: as a token and by way of the query, through the norm; an image a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_cls(const Backward<T> in) {
  const int64_t b = warp_of_grid();
  if (b >= in.batch) return;
  const int channels = in.channels;
  const bool normed = in.norm_weight != nullptr;
  const T* x = in.token(b, 0);
  float* grad = in.grad_token + b * channels;
  const float* extra = in.by_query + b * channels;
  const float mean = normed ? *in.means(b) : 0, rstd = normed ? *in.rstds(b) : 1;
  float plain = 0, along = 0;
  for (int c = lane_id(); c < channels; c += 32) {
    const float t = (to_float(x[c]) - mean) * rstd, dt = grad[c] + extra[c] * in.gain(c);
    if (normed) {
      in.by_gain[b * channels + c] += extra[c] * t;
      in.by_shift[b * channels + c] += extra[c];
      plain += dt;
      along += dt * t;
    }
    grad[c] = dt;
  }
  plain = warp_sum(plain) / channels;
  along = warp_sum(along) / channels;
  for (int c = lane_id(); c < channels; c += 32) {
    const float t = (to_float(x[c]) - mean) * rstd;
    const float dx = normed ? (grad[c] - plain - t * along) * rstd : grad[c];
    in.grad_cls[b * channels + c] = from_float<T>(dx);
  }
}

}  // namespace xattn::clsattn_cuda
