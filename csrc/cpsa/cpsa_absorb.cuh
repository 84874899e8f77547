// The weights of the absorbed form of cross-patch attention on CUDA, and their gradients. Products
// of at most 56 x 56, in float and in a fixed order.
#pragma once

#include "cpsa_tile.cuh"

namespace xattn::cpsa_cuda {

// Contiguous; biases may be null.
template <class T>
struct Weights {
  const T* qkv;  // [3 P, P]
  const T* qkv_bias;
  const T* proj;  // [P, P]
  const T* proj_bias;
};
template <class T>
struct WeightGrads {
  T* qkv;
  T* qkv_bias;
  T* proj;
  T* proj_bias;
};

// [P, P] as float, and a bias [P] or zeros below it; by the whole block.
template <class T>
XATTN_DEVICE void load_matrix(float* to, const T* matrix, const T* bias, int P) {
  for (int i = threadIdx.x; i < P * P + P; i += blockDim.x) {
    const T* const from = i < P * P ? matrix + i : bias == nullptr ? nullptr : bias + (i - P * P);
    to[i] = from == nullptr ? 0 : to_float(*from);
  }
}

constexpr int kAbsorbThreads = 256;
constexpr int kAbsorbBlocks = 8;  // for each of A and B

// A = c Wq^T Wk, a = c bq Wk, B = Wv^T Wo^T, b = bv Wo^T + bo. grid: kAbsorbBlocks x 2.
template <class T>
__global__ void __launch_bounds__(kAbsorbThreads)
    absorb(Weights<T> w, int P, float c, T* query, T* result, float* query_bias,
           float* result_bias) {
  SHARED(float, left, [kMatrix + kColumns]);
  SHARED(float, right, [kMatrix + kColumns]);
  const bool first = blockIdx.y == 0;
  const int square = P * P;
  const T* const qkv_bias = w.qkv_bias;
  if (first) {
    load_matrix<T>(left, w.qkv, qkv_bias, P);
    load_matrix<T>(right, w.qkv + square, nullptr, P);
  } else {
    load_matrix<T>(left, w.qkv + 2 * square, qkv_bias == nullptr ? nullptr : qkv_bias + 2 * P, P);
    load_matrix<T>(right, w.proj, w.proj_bias, P);
  }
  __syncthreads();
  for (int i = blockIdx.x * kAbsorbThreads + threadIdx.x; i < kMatrix + kColumns;
       i += kAbsorbBlocks * kAbsorbThreads) {
    const int row = i / kColumns, column = i % kColumns;
    const bool is_bias = row == kColumns;
    float sum = 0;
    if ((row < P || is_bias) && column < P) {
      for (int o = 0; o < P; ++o) {
        const float l = is_bias ? left[square + o] : left[o * P + row];
        sum += l * (first ? right[o * P + column] : right[column * P + o]);
      }
      if (first) sum *= c;
      if (!first && is_bias) sum += right[square + column];
    }
    if (is_bias) {
      (first ? query_bias : result_bias)[column] = sum;
    } else {
      (first ? query : result)[i] = from_float<T>(sum);
    }
  }
}

// The gradients of the weights from sums [2, kColumns + 1, kColumns]: dA and below it da, dB and
// db.
//   dWq = c Wk dA^T     dbq = c Wk da      dWk = c (Wq dA + bq da^T)     dbk = 0
//   dWv = Wo^T dB^T     dbv = Wo^T db      dWo = dB^T Wv^T + db bv^T     dbo = db
// grid: kAbsorbBlocks x 4, one row of blocks for each of q, k, v, o.
template <class T>
__global__ void __launch_bounds__(kAbsorbThreads)
    weight_gradients(Weights<T> w, int P, float c, const float* sums, WeightGrads<T> grads) {
  SHARED(float, matrix, [kMatrix + kColumns]);  // Wk, Wq, Wo, Wv
  SHARED(float, grad, [kMatrix + kColumns]);    // dA, da or dB, db
  const int which = blockIdx.y, square = P * P;
  const T* const bq = w.qkv_bias;
  if (which == 0) load_matrix<T>(matrix, w.qkv + square, nullptr, P);
  if (which == 1) load_matrix<T>(matrix, w.qkv, bq, P);
  if (which == 2) load_matrix<T>(matrix, w.proj, nullptr, P);
  if (which == 3)
    load_matrix<T>(matrix, w.qkv + 2 * square, bq == nullptr ? nullptr : bq + 2 * P, P);
  const float* const half = sums + (which < 2 ? 0 : kMatrix + kColumns);
  for (int i = threadIdx.x; i < kMatrix + kColumns; i += blockDim.x) grad[i] = half[i];
  __syncthreads();
  const float* const grad_bias = grad + kMatrix;
  T* const to = which == 3 ? grads.proj : grads.qkv + which * square;
  const float factor = which < 2 ? c : 1;
  for (int i = blockIdx.x * kAbsorbThreads + threadIdx.x; i < square + P;
       i += kAbsorbBlocks * kAbsorbThreads) {
    const int row = i / P, column = i % P;
    float sum = 0;
    if (i < square) {
      if (which == 1) sum = matrix[square + row] * grad_bias[column];
      if (which == 3) sum = grad_bias[row] * matrix[square + column];
      for (int k = 0; k < P; ++k) {
        if (which == 0) sum += matrix[row * P + k] * grad[column * kColumns + k];
        if (which == 1) sum += matrix[row * P + k] * grad[k * kColumns + column];
        if (which == 2) sum += matrix[k * P + row] * grad[column * kColumns + k];
        if (which == 3) sum += grad[k * kColumns + row] * matrix[column * P + k];
      }
      to[i] = from_float<T>(factor * sum);
    } else {
      T* const bias = which == 3 ? grads.proj_bias : grads.qkv_bias;
      if (bias == nullptr) continue;
      if (which == 0 || which == 2) {
        for (int k = 0; k < P; ++k) {
          sum += matrix[which == 0 ? column * P + k : k * P + column] * grad_bias[k];
        }
      }
      if (which == 3) sum = grad_bias[column];
      bias[(which == 3 ? 0 : which * P) + column] = from_float<T>(factor * sum);
    }
  }
}

}  // namespace xattn::cpsa_cuda
