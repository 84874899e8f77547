// CLS cross attention of any sizes and strides: the normalised tokens are written once, and all
// products are small_matmul.cuh's. Its states are those of the fused kernels.
#pragma once

#include "clsattn_backward.cuh"
#include "clsattn_forward.cuh"

namespace xattn::clsattn_cuda {

// hat [batch, tokens, C], the tokens t; `known`: mean and rstd are in the state, else they go
// there.
template <class T>
__global__ void __launch_bounds__(kThreads)
    normalise_tokens(const Inputs<T> in, T* __restrict__ hat, bool known) {
  const int64_t row = warp_of_grid();
  if (row >= in.batch * in.tokens) return;
  const int64_t b = row / in.tokens;
  const int n = static_cast<int>(row % in.tokens);
  const T* x = in.token(b, n);
  Moments m{0, 1};
  if (in.norm_weight && known) {
    m = {in.means(b)[n], in.rstds(b)[n]};
  } else if (in.norm_weight) {
    m = token_moments(x, in.channels, in.eps);
    if (lane_id() == 0) {
      in.means(b)[n] = m.mean;
      in.rstds(b)[n] = m.rstd;
    }
  }
  for (int c = lane_id(); c < in.channels; c += 32) {
    hat[row * in.channels + c] = from_float<T>((to_float(x[c]) - m.mean) * m.rstd);
  }
}

// Over the block; every thread gets the result.
template <class Op>
XATTN_DEVICE float fold_block(float x, Op op) {
  SHARED(float, folded, [kWarps]);
  x = fold_lanes<1, 32>(x, op);
  __syncthreads();  // the results of a call before are read
  if (lane_id() == 0) folded[threadIdx.x / 32] = x;
  __syncthreads();
  x = folded[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = op(x, folded[warp]);
  return x;
}

// logits [batch, heads, tokens] to weights relative to the highest, after dropout, and part_stats:
// a head of an image a block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh_rows(const Forward<T> in, float* __restrict__ logits) {
  const int64_t unit = blockIdx.x;
  float *row = logits + unit * in.tokens, *stats = in.part_stats + unit * kStats;
  float highest = -INFINITY, total = 0, kept = 0;
  for (int n = threadIdx.x; n < in.tokens; n += kThreads) highest = fmaxf(highest, row[n]);
  highest = fold_block(highest, MaxOf{});
  for (int n = threadIdx.x; n < in.tokens; n += kThreads) {
    float w = ptx::exp2(row[n] - highest);
    total += w;
    w *= in.keep(unit, n);
    kept += w;
    row[n] = w;
  }
  total = fold_block(total, SumOf{});
  kept = fold_block(kept, SumOf{});
  if (threadIdx.x > 0) return;
  stats[kTop] = highest;
  stats[kTotal] = total;
  stats[kShare] = kept;
}

// products [batch, 2 heads, tokens] of the tokens with g dz and g u, to w m and ds, and part_ds: a
// head of an image a block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh_grad_rows(const Backward<T> in, float* __restrict__ products) {
  const int64_t unit = blockIdx.x, b = unit / in.heads;
  const float* number = in.numbers + unit * kNumbers;
  float* grads = products + (b * 2 * in.heads + unit % in.heads) * in.tokens;
  float* keys = grads + int64_t{in.heads} * in.tokens;
  float sum = 0;
  for (int n = threadIdx.x; n < in.tokens; n += kThreads) {
    const Coefficients c = coefficients(grads[n], keys[n], in.keep(unit, n), in.scale,
                                        number[kDelta], number[kConstant], number[kLogSum]);
    grads[n] = c.kept;
    keys[n] = c.ds;
    sum += to_float(from_float<T>(c.ds));  // as the product takes it
  }
  sum = fold_block(sum, SumOf{});
  if (threadIdx.x == 0) in.part_ds[unit] = sum;
}

// The gradients of the tokens from dt [batch, tokens, C], a token a warp.
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_backward(const Backward<T> in, const T* __restrict__ hat, const float* __restrict__ dt) {
  const int64_t row = warp_of_grid();
  if (row >= in.batch * in.tokens) return;
  const int64_t b = row / in.tokens;
  const int n = static_cast<int>(row % in.tokens), channels = in.channels;
  hat += row * channels;
  dt += row * channels;
  if (n == 0) {
    for (int c = lane_id(); c < channels; c += 32) in.grad_token[b * channels + c] = dt[c];
    return;
  }
  float plain = 0, along = 0, rstd = 1;
  if (in.norm_weight) {
    for (int c = lane_id(); c < channels; c += 32) {
      plain += dt[c];
      along += dt[c] * to_float(hat[c]);
    }
    plain = warp_sum(plain) / channels;
    along = warp_sum(along) / channels;
    rstd = in.rstds(b)[n];
  }
  T* grad = in.grad_patches + (b * (in.tokens - 1) + n - 1) * channels;
  for (int c = lane_id(); c < channels; c += 32) {
    const float dx = in.norm_weight ? (dt[c] - plain - to_float(hat[c]) * along) * rstd : dt[c];
    grad[c] = from_float<T>(dx);
  }
}

}  // namespace xattn::clsattn_cuda
