// Backward of digest attention over images and heads.
//
// With P the softmax weights, m the dropout factors, O the output and dO its gradient:
//   g = (dO V^T) m,   dS = P (g - rowsum(dO O)),   dV = (P m)^T dO,
//   dQ = scale dS K,  dK = scale dS^T Q,           dbias = sum of dS.
// P is recomputed from the logits and the statistics of their rows.
#pragma once

#include "digest_bias.h"

namespace xattn::XATTN_ISA::digest {

template <class U>
struct Backward {
  using S = typename U::Storage;
  using T = typename U::T;
  using V = typename U::V;
  using Elem = typename U::Elem;
  using Weight = typename U::Weight;
  static constexpr int R = U::kRows, L = U::L;
  static constexpr int64_t kTiles = 8;  // of queries in a block: they share a visit to dK and dV

  const U& u;
  BlockBias<U> bias;
  BiasGradient<U> bias_gradient;
  uint32_t* index;
  Elem *keys, *values, *key_values;  // K and V with keys as lanes, K with channels as lanes
  // Of a block: "rows" are broadcast by a tile, "steps" are its vectors; they differ in pairs
  // alone.
  Elem *query_rows, *grad_rows, *query_steps, *grad_steps;
  T *top, *inverse, *delta;  // per query
  T* ds;                     // [rows][stride]: dS
  Weight* ds_rows;           // the same, as the products over keys read it
  Elem *ds_steps, *p_steps;  // dS and P m, as the products over queries read them
  T *dropout, *grad_query, *key_sums;

  static int64_t scratch(const DigestArgs& a) {
    Arena arena(nullptr);
    const U u{a};
    Backward b(u, arena);
    return arena.used();
  }
  // dK and dV of a unit, [2][keys][width_d].
  static int64_t key_part_size(const U& u) { return 2 * u.vectors() * L * u.width_d(); }

  Backward(const U& u, Arena& arena) : u(u), bias(u, kTiles * R, arena), bias_gradient(u, arena) {
    const DigestArgs& a = u.args;
    constexpr int64_t rows = kTiles * R, steps = rows / U::kStep;
    index = arena.take<uint32_t>(u.index_size());
    keys = arena.take<Elem>(u.transposed_size());
    values = arena.take<Elem>(u.transposed_size());
    key_values = arena.take<Elem>(u.values_size());
    query_rows = arena.take<Elem>(rows * u.stride_d());
    grad_rows = arena.take<Elem>(rows * u.stride_d());
    query_steps = U::kPairs ? arena.take<Elem>(steps * u.width_d()) : query_rows;
    grad_steps = U::kPairs ? arena.take<Elem>(steps * u.width_d()) : grad_rows;
    top = arena.take<T>(rows + L);
    inverse = arena.take<T>(rows + L);
    delta = arena.take<T>(rows + L);
    ds = arena.take<T>(rows * u.stride() + L);
    ds_rows = U::kPairs ? arena.take<Weight>(rows * u.stride()) : (Weight*)ds;
    ds_steps = U::kPairs ? arena.take<Elem>(steps * u.stride()) : (Elem*)ds;
    p_steps = arena.take<Elem>(steps * u.stride());
    dropout = arena.take<T>(a.dropout_p > 0 ? (rows + 6) * u.factor_stride() : 0);
    grad_query = arena.take<T>(u.chunks() > 1 ? rows * u.width_d() : 0);
    key_sums = arena.take<T>(a.key_parts ? 0 : key_part_size(u));
  }

  void set_unit(int64_t b, int64_t head) {
    const auto k = key_rows<S>(u.args, index, b, head, 0);
    const auto v = key_rows<S>(u.args, index, b, head, 1);
    const auto key = [&](int64_t i) XATTN_LAMBDA_INLINE { return k.row(i); };
    const auto value = [&](int64_t i) XATTN_LAMBDA_INLINE { return v.row(i); };
    const int64_t count = u.args.keys();
    U::P::transposed(key, count, u.d(), u.steps_d(), keys);
    U::P::transposed(value, count, u.d(), u.steps_d(), values);
    U::P::values(key, count, u.vectors() * L, u.d(), u.width_d(), key_values);
    bias.set_head(head);
  }

  // Queries [i0, i0 + rows), their dO, statistics and rowsum(dO O).
  void set_block(int64_t b, int64_t head, int64_t i0, int64_t rows) {
    const DigestArgs& a = u.args;
    const int64_t padded = u.tiles(rows) * R, at = head * u.d();
    const S* q = (const S*)a.qkv + b * a.qkv_stride[0] + i0 * a.qkv_stride[1] + at;
    const S* g = (const S*)a.grad_out + b * a.grad_out_stride[0] + i0 * a.grad_out_stride[1] + at;
    const S* out = (const S*)a.out + (b * a.tokens + i0) * a.channels() + at;
    const auto query = [&](int64_t t) XATTN_LAMBDA_INLINE { return q + t * a.qkv_stride[1]; };
    const auto grad = [&](int64_t t) XATTN_LAMBDA_INLINE { return g + t * a.grad_out_stride[1]; };
    U::P::rows(query, rows, padded, u.d(), u.stride_d(), query_rows);
    U::P::rows(grad, rows, padded, u.d(), u.stride_d(), grad_rows);
    if (U::kPairs) {
      U::P::values(query, rows, padded, u.d(), u.width_d(), query_steps);
      U::P::values(grad, rows, padded, u.d(), u.width_d(), grad_steps);
    }
    for (int64_t r = 0; r < padded; r += L) {
      V sums[L];
      for (int l = 0; l < L; ++l) {
        sums[l] = V{};
        const int64_t i = min_of(r + l, rows - 1);
        for (int64_t c = 0; c < u.d(); c += L) {
          sums[l] += load_n(grad(i) + c, u.d() - c) * load_n(out + i * a.channels() + c, u.d() - c);
        }
      }
      fold_each<Add>(sums, delta + r);
    }
    for (int64_t r = 0; r < padded; ++r) {
      // A row that only fills its tile has no weights.
      top[r] = r < rows ? u.stats(b, head, i0 + r)[0] : T(-kLowest);
      inverse[r] = r < rows ? u.stats(b, head, i0 + r)[1] : T(0);
      if (r >= rows) delta[r] = 0;
    }
    bias.set_block(i0, rows);
  }

  // P m and dS of one tile against kC vectors of keys; `at` is their place in a row of weights.
  template <int kC>
  XATTN_MEMBER void weights(int64_t r0, int64_t vector, int64_t at, const T* factors) const {
    const int64_t stride = u.stride();
    alignas(64) T p[R][kC * L];
    V acc[R][kC];
    u.logits(acc, query_rows + r0 * u.stride_d(), keys, bias, r0, vector);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < kC; ++c) {
        store(&p[r][c * L], U::exp2(acc[r][c] - splat(top[r0 + r])) * splat(inverse[r0 + r]));
      }
    }
    u.products(acc, grad_rows + r0 * u.stride_d(), values, vector);
    XATTN_UNROLL
    for (int c = 0; c < kC; ++c) {
      V p_rows[R];
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        p_rows[r] = load(&p[r][c * L]);
        V g = acc[r][c], pm = p_rows[r];
        if (factors) {
          const V factor = load(factors + (r0 + r) * u.factor_stride() + at + c * L);
          g *= factor;
          pm *= factor;
        }
        acc[r][c] = p_rows[r] * (g - splat(delta[r0 + r]));
        p_rows[r] = pm;
      }
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t place = (r0 + r) * stride + at + c * L;
        store(ds + place, acc[r][c]);
        if constexpr (U::kPairs) {
          store(ds_rows + place, acc[r][c]);
          if (r % 2 == 0) {
            const int64_t step = (r0 + r) / 2 * stride + at + c * L;
            store(ds_steps + step, to_pair(acc[r][c], acc[r + 1][c]));
            store(p_steps + step, to_pair(p_rows[r], p_rows[r + 1]));
          }
        } else {
          store(p_steps + place, p_rows[r]);
        }
      }
    }
  }

  // sums[k][:] (+)= sum over queries of steps[query][k] * rows[query][:], for keys [k0, k0 +
  // count).
  void add_key_sums(const Elem* steps, const Elem* rows, int64_t queries, int64_t k0, int64_t count,
                    bool starts, T* sums) const {
    constexpr int kR = U::kKeyRows;
    const int64_t width = u.width_d();
    for (int64_t k = 0; k < count; k += kR) {
      u.template weighted_sum<kR>(steps + k, 1, u.stride(), rows, queries / U::kStep,
                                  [&](int r, int64_t c, V value) XATTN_LAMBDA_INLINE {
                                    T* sum = sums + (k0 + k + r) * width + c;
                                    store(sum, starts ? value : load(sum) + value);
                                  });
    }
  }

  void run_block(int64_t b, int64_t head, int64_t i0, int64_t rows, bool starts, T* sums) {
    const DigestArgs& a = u.args;
    const int64_t tiles = u.tiles(rows), stride = u.stride(), chunks = u.chunks();
    const int64_t width = u.width_d();
    set_block(b, head, i0, rows);
    S* grad_q = (S*)a.grad_qkv + (b * a.tokens + i0) * 3 * a.channels() + head * u.d();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = u.chunk_begin(chunk), last = u.chunk_begin(chunk + 1), k0 = first * L;
      const int64_t count = min_of(last * L, a.keys()) - k0;
      const T* factors = nullptr;
      if (a.dropout_p > 0) {
        dropout_factors(a, index, b * a.heads + head, i0, rows, k0, count, dropout,
                        u.factor_stride());
        factors = dropout + i0 % 4 * u.factor_stride();
      }
      for_columns<U::kColumns, 1>(last - first, [&](auto group, int64_t at) XATTN_LAMBDA_INLINE {
        for (int64_t r0 = 0; r0 < tiles * R; r0 += R) {
          weights<decltype(group)::value>(r0, first + at, at * L, factors);
        }
      });
      bias_gradient.add(ds, stride, i0, rows, k0, k0 + count);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        u.template weighted_sum<R>(
            (const Elem*)(ds_rows + tile * R * stride), stride / U::kStep, 1,
            key_values + k0 / U::kStep * width, (count + U::kStep - 1) / U::kStep,
            [&](int r, int64_t c, V value) XATTN_LAMBDA_INLINE {
              const int64_t i = tile * R + r;
              if (chunks > 1) {
                if (chunk > 0) value += load(grad_query + i * width + c);
                store(grad_query + i * width + c, value);
              }
              if (chunk + 1 < chunks || i >= rows) return;
              store_n(grad_q + i * 3 * a.channels() + c, value * T(a.scale), u.d() - c);
            });
      }
      add_key_sums(ds_steps, query_steps, tiles * R, k0, count, starts, sums);
      add_key_sums(p_steps, grad_steps, tiles * R, k0, count, starts,
                   sums + u.vectors() * L * width);
    }
  }

  void run(int64_t b, int64_t head, int64_t split) {
    const DigestArgs& a = u.args;
    const int64_t begin = split * a.split_rows, end = min_of(begin + a.split_rows, a.tokens);
    const int64_t tiles = u.tiles(end - begin), blocks = (tiles + kTiles - 1) / kTiles;
    const int64_t part = (head * a.batch + b) * a.splits + split;
    T* sums = a.key_parts ? (T*)a.key_parts + part * key_part_size(u) : key_sums;
    bias_gradient.clear();
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i0 = begin + block * tiles / blocks * R;
      const int64_t i1 = begin + (block + 1) * tiles / blocks * R;
      run_block(b, head, i0, min_of(i1, end) - i0, block == 0, sums);
    }
    bias_gradient.finish(b, split, head);
    if (!a.key_parts) write_key_gradients(u, index, b, head, sums, 1);
  }
};

// dK and dV of one unit from `parts` shares of their sums.
template <class U, class T = typename U::T>
void write_key_gradients(const U& u, const uint32_t* index, int64_t b, int64_t head, const T* sums,
                         int64_t parts) {
  using S = typename U::Storage;
  const DigestArgs& a = u.args;
  const int64_t C = a.channels(), half = u.vectors() * U::L * u.width_d();
  for (int which = 0; which < 2; ++which) {
    const int64_t at = which * C + head * u.d();
    const KeyRows<S> rows{index,
                          a.tokens,
                          (S*)a.grad_qkv + b * a.tokens * 3 * C + C + at,
                          (S*)a.grad_digest_kv + b * a.digests * 2 * C + at,
                          3 * C,
                          2 * C};
    const T scale = which == 0 ? T(a.scale) : T(1);
    for (int64_t k = 0; k < a.keys(); ++k) {
      for (int64_t c = 0; c < u.d(); c += U::L) {
        const T* part = sums + which * half + k * u.width_d() + c;
        auto sum = load(part);
        for (int64_t i = 1; i < parts; ++i) sum += load(part + i * 2 * half);
        store_n(rows.row(k) + c, sum * scale, u.d() - c);
      }
    }
  }
}

template <class U>
void backward_items(const DigestArgs& a, int64_t begin, int64_t end, void* scratch) {
  const U u{a};
  Arena arena(scratch);
  Backward<U> f(u, arena);
  f.bias.clear();
  order_keys(a, f.index);
  int64_t unit = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / a.splits / a.batch, b = item / a.splits % a.batch;
    if (item / a.splits != unit) f.set_unit(b, head);
    unit = item / a.splits;
    f.run(b, head, item % a.splits);
  }
}

}  // namespace xattn::XATTN_ISA::digest
