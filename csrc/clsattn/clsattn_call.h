// A call's sizes and tensors, what its stages hand on, and its tokens' way into scratch.
#pragma once

#include "clsattn.h"
#include "clsattn_products.h"
#include "common/arena.h"
#include "common/dropout.h"

namespace xattn::XATTN_ISA::clsattn {

constexpr int64_t kBlockBytes = 24 << 10;  // of tokens in scratch at a time
constexpr int64_t kBlockTokens = 64;       // at most

template <class S>
struct Call {
  using T = typename ComputeOf<S>::type;
  using V = vec<T>;
  static constexpr int L = Lanes<T>::n;

  const ClsAttnArgs& args;
  int64_t batch, tokens, heads, dim, channels, parts;
  int64_t vectors;  // of a row of channels
  int64_t stride;   // of such rows in scratch; an odd number of vectors, to spread over cache sets
  int64_t block;    // tokens taken together
  int64_t row;      // of a value for each of them
  V tail;           // 1 in the lanes of the last vector that are channels, else 0

  // What the stages hand on, padded to `stride`.
  T *cls_hat, *cls;        // [batch]: CLS after the norm, without and with its weight and shift
  T* part_stats;           // [batch][parts][heads][3]
  T* part_sums;            // [batch][parts][heads][stride]
  T *pooled, *grad_keys;   // [batch][heads][stride]: sum_t w_t t, and the gradient of u
  T* kept;                 // [batch][heads]: sum of the weights that dropout left
  T *grad_out, *grad_q;    // [batch]
  T *grad_cls, *by_query;  // [batch]: of CLS as a token, and by way of the query
  T* grad_pooled;          // [batch][heads]
  T* grad_weights;         // [batch][heads][tokens]
  int64_t bytes;

  explicit Call(const ClsAttnArgs& a)
      : args(a),
        batch(a.batch),
        tokens(a.tokens),
        heads(a.heads),
        dim(a.head_dim),
        channels(a.channels()),
        parts(a.parts),
        vectors((channels + L - 1) / L),
        stride((vectors | 1) * L) {
    const int64_t fit = kBlockBytes / (stride * (int64_t)sizeof(T)) / 4 * 4;
    block = min_of(kBlockTokens, max_of<int64_t>(8, fit));
    row = round_up(block, 16);
    for (int l = 0; l < L; ++l) tail[l] = (vectors - 1) * L + l < channels ? T(1) : T(0);
    Arena arena(a.workspace);
    take(arena);
    bytes = arena.used();
  }

  bool backward() const { return args.grad_out != nullptr; }
  bool norm() const { return args.norm_weight != nullptr; }
  bool dropout() const { return args.dropout_p > 0; }

  // Lanes of vector z that are channels.
  XATTN_MEMBER int64_t left(int64_t z) const { return channels - z * L; }
  XATTN_MEMBER V get(const T* p, int64_t z) const { return load_n(p + z * L, left(z)); }
  template <class P>
  XATTN_MEMBER void put(P* p, int64_t z, V v) const {
    store_n(p + z * L, v, left(z));
  }
  // The norm's weight and shift; 1 and 0 where there is none.
  XATTN_MEMBER V norm_weight(int64_t z) const {
    return norm() ? load_n((const S*)args.norm_weight + z * L, left(z)) : splat(T(1));
  }
  XATTN_MEMBER V norm_shift(int64_t z) const {
    return args.norm_bias ? load_n((const S*)args.norm_bias + z * L, left(z)) : V{};
  }

  const S* token(int64_t b, int64_t t) const {
    if (t == 0) return (const S*)args.cls + b * args.cls_stride;
    return (const S*)args.patches + b * args.patches_stride[0] + (t - 1) * args.patches_stride[1];
  }
  S* grad_patch(int64_t b, int64_t t) const {
    return (S*)args.grad_patches + (b * (tokens - 1) + t - 1) * channels;
  }
  int64_t head_row() const { return dim + 2 * channels; }
  T* query(int64_t b, int64_t h) const {
    return (T*)args.head_state + (b * heads + h) * head_row();
  }
  T* key(int64_t b, int64_t h) const { return query(b, h) + dim; }
  T* pooled_hat(int64_t b, int64_t h) const { return query(b, h) + dim + channels; }
  T* token_state(int64_t b, int64_t row) const {
    return (T*)args.token_state + (b * (heads + 2 * norm()) + row) * tokens;
  }
  // W of one head: [dim][channels].
  Matrix<S> head_weight(const void* weight, int64_t h) const {
    return {(const S*)weight + h * dim * channels, channels};
  }
  T* of_head(T* rows, int64_t b, int64_t h) const { return rows + (b * heads + h) * stride; }
  T* stats(int64_t unit, int64_t h) const { return part_stats + (unit * heads + h) * 3; }
  int64_t part_begin(int64_t part) const { return part * tokens / parts; }

  // f(z, Int<whether it is the last and not whole>) for each vector of channels.
  template <class F>
  XATTN_MEMBER void for_vectors(F f) const {
    const int64_t whole = channels / L;
    for (int64_t z = 0; z < whole; ++z) f(z, Int<0>{});
    if (whole < vectors) f(whole, Int<1>{});
  }
  template <class P, int kTail>
  XATTN_MEMBER V read(const P* p, int64_t z, Int<kTail>) const {
    if constexpr (kTail) return load_n(p + z * L, left(z));
    return load(p + z * L);
  }

  // hat[i][:] = token first + i of image b after the norm, before its weight and shift. kKnown: its
  // mean and deviation stand in token_state, else they are found and kept there.
  template <bool kKnown>
  void gather(int64_t b, int64_t first, int64_t count, T* hat) const {
    for_rows<4>(count, [&](auto rows, int64_t i) XATTN_LAMBDA_INLINE {
      constexpr int R = decltype(rows)::value;
      const S* from[R];
      for (int r = 0; r < R; ++r) from[r] = token(b, first + i + r);
      T* to = hat + i * stride;
      if (!norm()) {
        return for_vectors([&](int64_t z, auto last) XATTN_LAMBDA_INLINE {
          for (int r = 0; r < R; ++r) store(to + r * stride + z * L, read(from[r], z, last));
        });
      }
      T mean[R + L], inverse[R + L];
      T *means = token_state(b, heads) + first + i, *inverses = means + tokens;
      if constexpr (!kKnown) moments(from, mean, inverse);
      for (int r = 0; r < R; ++r) {
        if constexpr (kKnown) {
          mean[r] = means[r];
          inverse[r] = inverses[r];
        } else {
          means[r] = mean[r];
          inverses[r] = inverse[r];
        }
      }
      for_vectors([&](int64_t z, auto last) XATTN_LAMBDA_INLINE {
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          V v = (read(from[r], z, last) - mean[r]) * inverse[r];
          if constexpr (decltype(last)::value) v *= tail;
          store(to + r * stride + z * L, v);
        }
      });
    });
  }

  // to(i) = the gradient of token i before the norm, from that after it, times its weight; inverse:
  // 1 / deviation of the tokens.
  template <class To>
  void before_norm(const T* grad, const T* hat, const T* inverse, int64_t count, To to) const {
    for_rows<4>(count, [&](auto rows, int64_t i) XATTN_LAMBDA_INLINE {
      constexpr int R = decltype(rows)::value;
      V acc[2 * R] = {};
      const T *g = grad + i * stride, *x = hat + i * stride;
      if (norm()) {
        for (int64_t z = 0; z < vectors; ++z) {
          XATTN_UNROLL
          for (int r = 0; r < R; ++r) {
            const V v = load(g + r * stride + z * L);
            acc[2 * r] += v;
            acc[2 * r + 1] += v * load(x + r * stride + z * L);
          }
        }
      }
      T sums[2 * R + L];
      fold_each<Add>(acc, sums);
      for (int r = 0; r < R; ++r) {
        S* out = to(i + r);
        const T scale = norm() ? inverse[i + r] : T(1);
        const T mean = sums[2 * r] / channels, slope = sums[2 * r + 1] / channels;
        for (int64_t z = 0; z < vectors; ++z) {
          const V v = load(g + r * stride + z * L) - load(x + r * stride + z * L) * slope;
          put(out, z, norm() ? (v - mean) * scale : load(g + r * stride + z * L));
        }
      }
    });
  }

  // Dropout factors of keys [first, first + count) for one head; whole vectors of floats.
  void dropout_factors(int64_t b, int64_t h, int64_t first, int64_t count, T* out) const {
    const double scaled = args.dropout_p * 4294967296.0;
    const uint32_t threshold = scaled >= 4294967295.0 ? 4294967295u : (uint32_t)scaled;
    const T kept = T(1 / (1 - args.dropout_p));
    const uint64_t unit = (uint64_t)(b * heads + h);
    constexpr int lanes = Lanes<float>::n;
    for (int64_t i = 0; i < count; i += lanes) {
      vu32 at;
      for (int l = 0; l < lanes; ++l) at[l] = (uint32_t)(first + i + l);
      vu32 words[4] = {at, splat((uint32_t)unit), splat((uint32_t)(unit >> 32)), vu32{}};
      philox(args.dropout_key, words);
      for (int l = 0; l < lanes; ++l) out[i + l] = words[0][l] >= threshold ? kept : T(0);
    }
  }

 private:
  void take(Arena& arena) {
    const int64_t rows = batch * stride, head_rows = rows * heads;
    cls_hat = arena.take<T>(rows);
    cls = arena.take<T>(rows);
    part_stats = arena.take<T>(batch * parts * heads * 3);
    part_sums = arena.take<T>(head_rows * parts);
    pooled = arena.take<T>(head_rows);
    kept = arena.take<T>(batch * heads);
    if (!backward()) return;
    grad_keys = arena.take<T>(head_rows);
    grad_out = arena.take<T>(rows);
    grad_q = arena.take<T>(rows);
    grad_cls = arena.take<T>(rows);
    by_query = arena.take<T>(rows);
    grad_pooled = arena.take<T>(head_rows);
    grad_weights = arena.take<T>(batch * heads * tokens);
  }

  // Mean and 1 / deviation of R tokens; the variance is that of the differences from the mean.
  template <int R>
  XATTN_MEMBER void moments(const S* const (&from)[R], T* mean, T* inverse) const {
    V sums[R] = {}, squares[R] = {};
    for_vectors([&](int64_t z, auto last) XATTN_LAMBDA_INLINE {
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) sums[r] += read(from[r], z, last);
    });
    fold_each<Add>(sums, mean);
    for (int r = 0; r < R; ++r) mean[r] /= channels;
    for_vectors([&](int64_t z, auto last) XATTN_LAMBDA_INLINE {
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        V v = read(from[r], z, last) - mean[r];
        if constexpr (decltype(last)::value) v *= tail;
        squares[r] += v * v;
      }
    });
    fold_each<Add>(squares, inverse);
    for (int r = 0; r < R; ++r) {
      const T variance = inverse[r] / channels + T(args.eps);
      inverse[r] = 1 / (sizeof(T) == 4 ? (T)__builtin_sqrtf((float)variance)
                                       : (T)__builtin_sqrt((double)variance));
    }
  }
};

}  // namespace xattn::XATTN_ISA::clsattn
