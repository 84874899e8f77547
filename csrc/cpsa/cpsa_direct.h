// The weights of the direct form of CPSA, their gradients, and its dropout mask.
#pragma once

#include "common/dropout.h"
#include "cpsa_bundle.h"
#include "cpsa_result.h"
#include "cpsa_softmax.h"
#include "cpsa_weights.h"

namespace xattn::XATTN_ISA {

// Sums over tokens of one part of a call: dWqkv = dQKV^T X [3P, P], its bias, dWo = dO^T Z [P, P],
// its bias. The gradient of q is that of the scaled queries.
template <class T>
struct DirectSums {
  T *qkv, *qkv_bias, *proj, *proj_bias;
  int64_t bytes;

  DirectSums(int64_t n, void* memory) {
    Arena arena(memory);
    qkv = arena.take<T>(3 * n * n);
    qkv_bias = arena.take<T>(3 * n);
    proj = arena.take<T>(n * n);
    proj_bias = arena.take<T>(n);
    bytes = arena.used();
  }
};

template <class S, class M>
struct DirectWeights {
  using T = typename M::Acc;
  PackedWeight<M> query;  // x -> scaled queries, logits base 2 in the forward, e in the backward
  PackedWeight<M> key_value;  // x -> keys, values
  PackedWeight<M> proj;       // forward: z -> z Wo^T + bo
  PackedWeight<M> qkv_back;   // dQ, dK, dV -> dX
  PackedWeight<M> proj_back;  // dO -> dO Wo
  int64_t bytes;

  // Lays everything out in `memory`, without touching it. Null: only counts.
  DirectWeights(const CpsaArgs& args, CpsaPass pass, void* memory) : n_(args.elements) {
    Arena arena(memory);
    query = take_weight<M>(arena, n_, n_);
    key_value = take_weight<M>(arena, n_, 2 * n_);
    if (pass == CpsaPass::kForward) {
      proj = take_weight<M>(arena, n_, n_);
    } else {
      qkv_back = take_weight<M>(arena, 3 * n_, n_);
      proj_back = take_weight<M>(arena, n_, n_);
    }
    qkv_ = new_matrix<T>(arena, 3 * n_, n_);
    proj_ = new_matrix<T>(arena, n_, n_);
    qkv_bias_ = arena.take<T>(3 * n_);
    proj_bias_ = arena.take<T>(n_);
    bytes = arena.used();
  }

  void compute(const CpsaArgs& args, CpsaPass pass) const {
    const bool backward = pass == CpsaPass::kBackward;
    read_matrix(static_cast<const S*>(args.qkv_weight), n_, qkv_);
    read_matrix(static_cast<const S*>(args.proj_weight), n_, proj_);
    read_values(static_cast<const S*>(args.qkv_bias), 3 * n_, qkv_bias_);
    read_values(static_cast<const S*>(args.proj_bias), n_, proj_bias_);
    const T scale = (T)(args.scale * (backward ? 1.0 : kLog2eDouble));
    for (int64_t r = 0; r < n_; ++r) multiply_by(scale, qkv_.row(r), n_);
    multiply_by(scale, qkv_bias_, n_);
    // The keys' bias adds the same number to a whole row of logits and cancels; left out, it cannot
    // cost precision either.
    __builtin_memset(qkv_bias_ + n_, 0, n_ * sizeof(T));

    const auto q = [&](int64_t k, int64_t o) { return qkv_.row(o)[k]; };
    const auto kv = [&](int64_t k, int64_t o) { return qkv_.row(n_ + o)[k]; };
    pack_weight(query, n_, n_, q, qkv_bias_);
    pack_weight(key_value, n_, 2 * n_, kv, qkv_bias_ + n_);
    if (backward) {
      const auto qkv_entry = [&](int64_t k, int64_t o) { return qkv_.row(k)[o]; };
      const auto proj_entry = [&](int64_t k, int64_t o) { return proj_.row(k)[o]; };
      pack_weight(qkv_back, 3 * n_, n_, qkv_entry, nullptr);
      pack_weight(proj_back, n_, n_, proj_entry, nullptr);
    } else {
      const auto proj_entry = [&](int64_t k, int64_t o) { return proj_.row(o)[k]; };
      pack_weight(proj, n_, n_, proj_entry, proj_bias_);
    }
  }

  // Writes the sums as gradients; the memory of the weights is used up.
  void write_gradients(const CpsaArgs& args, const DirectSums<T>& sums) const {
    read_matrix(sums.qkv, n_, qkv_);
    read_matrix(sums.proj, n_, proj_);
    read_values(sums.qkv_bias, 3 * n_, qkv_bias_);
    read_values(sums.proj_bias, n_, proj_bias_);
    for (int64_t r = 0; r < n_; ++r) multiply_by((T)args.scale, qkv_.row(r), n_);
    multiply_by((T)args.scale, qkv_bias_, n_);
    // The keys' bias has no effect.
    __builtin_memset(qkv_bias_ + n_, 0, n_ * sizeof(T));
    write_matrix(qkv_, static_cast<S*>(args.grad_qkv_weight));
    write_matrix(proj_, static_cast<S*>(args.grad_proj_weight));
    if (args.grad_qkv_bias) {
      write_values(qkv_bias_, 3 * n_, static_cast<S*>(args.grad_qkv_bias));
    }
    if (args.grad_proj_bias) {
      write_values(proj_bias_, n_, static_cast<S*>(args.grad_proj_bias));
    }
  }

 private:
  int64_t n_;
  Matrix<T> qkv_, proj_;
  T *qkv_bias_, *proj_bias_;
};

// The dropout factors, 0 or 1 / (1 - p), of a block of queries of one head of one unit.
template <class T>
class DropoutMask {
 public:
  static constexpr int L = Lanes<T>::n;

  // `rows` is a multiple of 4: the generator gives four queries at a time.
  DropoutMask(const CpsaArgs& args, Arena& arena, int64_t rows, int64_t row)
      : wanted_(args.dropout_p > 0), heads_(args.heads), row_(row) {
    if (!wanted_) return;
    dropout_.key[0] = args.dropout_key[0];
    dropout_.key[1] = args.dropout_key[1];
    dropout_.threshold = (uint32_t)min_of(args.dropout_p * 0x1p32, 0x1p32 - 1);
    dropout_.keep_scale = 1;
    keep_scale_ = (T)(1.0 / (1.0 - args.dropout_p));
    // keep_weights() always writes a float vector's lanes.
    factors_ = arena.take<T>(rows * row + Lanes<float>::n);
  }

  bool wanted() const { return wanted_; }
  const T* row(int64_t query) const { return factors_ + query * row_; }

  // Queries from `first` (a multiple of 4) on, of all keys. `channel` counts over all images.
  void draw(int64_t channel, int64_t head, int64_t first, int64_t queries, int64_t keys) const {
    constexpr int kUnits = Lanes<float>::n;
    uint32_t low[kUnits], high[kUnits];
    for (int l = 0; l < kUnits; ++l) {
      const uint64_t unit = (uint64_t)((channel + l) * heads_ + head);
      low[l] = (uint32_t)unit;
      high[l] = (uint32_t)(unit >> 32);
    }
    for (int64_t q = 0; q < queries; q += 4) {
      for (int64_t s = 0; s < keys; ++s) {
        const uint32_t counter = (uint32_t)((first + q) / 4 * keys + s);
        T four[4 * kUnits];
        keep_weights(dropout_, splat(counter), load(low), load(high), four, kUnits);
        for (int i = 0; i < 4; ++i) {
          store(factors_ + (q + i) * row_ + s * L, load(four + i * kUnits) * keep_scale_);
        }
      }
    }
  }

 private:
  bool wanted_;
  int64_t heads_, row_;
  Dropout dropout_{};
  T keep_scale_ = 1;  // here, because the generator's is a float
  T* factors_ = nullptr;
};

}  // namespace xattn::XATTN_ISA
