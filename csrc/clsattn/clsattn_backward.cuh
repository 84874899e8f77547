// Backward of CLS cross attention but for its tokens, which are in clsattn_backward_tokens.cuh.
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
