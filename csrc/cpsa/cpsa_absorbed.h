// The weights of the absorbed form of CPSA, and their gradients.
#pragma once

#include "cpsa_bundle.h"
#include "cpsa_result.h"
#include "cpsa_softmax.h"
#include "cpsa_weights.h"

namespace xattn::XATTN_ISA {

// Sums over tokens of one part of a call: dA = X^T dY [P, P], da [P], dB = Z^T dO [P, P], db [P].
template <class T>
struct AbsorbedSums {
  T *a, *b, *a_bias, *b_bias;
  int64_t elements, bytes;

  AbsorbedSums(int64_t n, void* memory) : elements(n) {
    Arena arena(memory);
    a = arena.take<T>(n * n);
    b = arena.take<T>(n * n);
    a_bias = arena.take<T>(n);
    b_bias = arena.take<T>(n);
    bytes = arena.used();
  }
};

template <class S, class M>
struct AbsorbedWeights {
  using T = typename M::Acc;
  PackedWeight<M> query;       // x -> x A + a: logits base 2 in the forward, base e in the backward
  PackedWeight<M> result;      // z -> z B + b
  PackedWeight<M> query_back;  // dY -> dY A^T
  PackedWeight<M> result_back;  // dO -> dO B^T
  int64_t bytes;

  // Lays everything out in `memory`, without touching it. Null: only counts.
  AbsorbedWeights(const CpsaArgs& args, CpsaPass pass, void* memory) : n_(args.elements) {
    Arena arena(memory);
    const bool attends = args.patches > 1, backward = pass == CpsaPass::kBackward;
    if (attends) query = take_weight<M>(arena, n_, n_);
    if (!backward) result = take_weight<M>(arena, n_, n_);
    if (backward && attends) query_back = take_weight<M>(arena, n_, n_);
    if (backward) result_back = take_weight<M>(arena, n_, n_);
    Matrix<T>* const matrices[] = {&wq_, &wk_, &wv_, &wo_, &m0_, &m1_, &m2_};
    for (Matrix<T>* m : matrices) *m = new_matrix<T>(arena, n_, n_);
    T** const vectors[] = {&bq_, &bv_, &bo_, &v0_, &v1_};
    for (T** v : vectors) *v = arena.take<T>(n_);
    bytes = arena.used();
  }

  void compute(const CpsaArgs& args, CpsaPass pass) const {
    const bool backward = pass == CpsaPass::kBackward;
    read(args);
    if (args.patches > 1) {
      const T scale = (T)(args.scale * (backward ? 1.0 : kLog2eDouble));
      multiply(transposed(wq_), wk_, scale, m0_);  // A
      multiply_left(bq_, wk_, v0_);                // a
      multiply_by(scale, v0_, n_);
      const auto a = [&](int64_t k, int64_t o) { return m0_.row(k)[o]; };
      const auto a_back = [&](int64_t k, int64_t o) { return m0_.row(o)[k]; };
      pack_weight(query, n_, n_, a, v0_);
      if (backward) pack_weight(query_back, n_, n_, a_back, nullptr);
    }
    multiply(plain(wo_), wv_, (T)1, m0_);  // B^T
    if (backward) {
      const auto b_back = [&](int64_t k, int64_t o) { return m0_.row(k)[o]; };
      pack_weight(result_back, n_, n_, b_back, nullptr);
    } else {
      multiply_right(wo_, bv_, v0_);  // b
      for (int64_t i = 0; i < n_; ++i) v0_[i] += bo_[i];
      const auto b = [&](int64_t k, int64_t o) { return m0_.row(o)[k]; };
      pack_weight(result, n_, n_, b, v0_);
    }
  }

  // The gradients of the weights from those of A, a, B and b. Uses the matrices that compute()
  // read.
  void write_gradients(const CpsaArgs& args, const AbsorbedSums<T>& sums) const {
    S* weight = static_cast<S*>(args.grad_qkv_weight);
    S* bias = static_cast<S*>(args.grad_qkv_bias);
    const int64_t square = n_ * n_;
    const T scale = (T)args.scale;
    // Queries and keys; a single token has none.
    const bool attends = args.patches > 1;
    if (attends) {
      read_matrix(sums.a, sums.elements, m0_);
      read_values(sums.a_bias, n_, v0_);
      transpose_into(m0_, m1_);
      multiply(plain(wk_), m1_, scale, m2_);  // dWq = s Wk dA^T
      write_matrix(m2_, weight);
      multiply(plain(wq_), m0_, scale, m2_);  // dWk = s (Wq dA + bq da^T)
      add_outer(scale, bq_, v0_, m2_);
      write_matrix(m2_, weight + square);
      multiply_right(wk_, v0_, v1_);  // dbq = s Wk da
      multiply_by(scale, v1_, n_);
      if (bias) write_values(v1_, n_, bias);
    } else {
      __builtin_memset(weight, 0, 2 * square * sizeof(S));
      if (bias) __builtin_memset(bias, 0, n_ * sizeof(S));
    }
    if (bias) __builtin_memset(bias + n_, 0, n_ * sizeof(S));  // bk cancels in the softmax

    read_matrix(sums.b, sums.elements, m0_);
    read_values(sums.b_bias, n_, v0_);
    transpose_into(m0_, m1_);
    multiply(transposed(wo_), m1_, (T)1, m2_);  // dWv = Wo^T dB^T
    write_matrix(m2_, weight + 2 * square);
    multiply_left(v0_, wo_, v1_);  // dbv = Wo^T db
    if (bias) write_values(v1_, n_, bias + 2 * n_);
    transpose_into(wv_, m1_);
    multiply(transposed(m0_), m1_, (T)1, m2_);  // dWo = dB^T Wv^T + db bv^T
    add_outer((T)1, v0_, bv_, m2_);
    write_matrix(m2_, static_cast<S*>(args.grad_proj_weight));
    if (args.grad_proj_bias) write_values(v0_, n_, static_cast<S*>(args.grad_proj_bias));
  }

 private:
  void read(const CpsaArgs& args) const {
    const S* weight = static_cast<const S*>(args.qkv_weight);
    const S* bias = static_cast<const S*>(args.qkv_bias);
    if (args.patches > 1) {
      read_matrix(weight, n_, wq_);
      read_matrix(weight + n_ * n_, n_, wk_);
      read_values(bias, n_, bq_);
    }
    read_matrix(weight + 2 * n_ * n_, n_, wv_);
    read_matrix(static_cast<const S*>(args.proj_weight), n_, wo_);
    read_values(bias ? bias + 2 * n_ : nullptr, n_, bv_);
    read_values(static_cast<const S*>(args.proj_bias), n_, bo_);
  }

  int64_t n_;
  Matrix<T> wq_, wk_, wv_, wo_;
  T *bq_, *bv_, *bo_;
  Matrix<T> m0_, m1_, m2_;  // intermediate results
  T *v0_, *v1_;
};

}  // namespace xattn::XATTN_ISA
