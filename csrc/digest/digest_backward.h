// Backward of digest attention over images and heads.
//
// With P the softmax weights, m the dropout factors and dO the output's gradient:
//   g = (dO V^T) m,   dS = P (g - rowsum(P g)),   dV = (P m)^T dO,
//   dQ = scale dS K,  dK = scale dS^T Q,          dbias = sum of dS.
// P is recomputed from the logits and the statistics of their rows. rowsum(P g) is also rowsum(dO
// O), which would need no second look at a row; but where one weight is near 1, g and the sum
// nearly cancel, and only a sum of these very g leaves the right difference.
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
  // Tiles of queries in a block, which share a visit to dK and dV; fewer where rows are long.
  static constexpr int64_t kTiles = 8, kTilesOfLongRows = 4, kLongRow = 640;

  const U& u;
  BlockBias<U> bias;
  BiasGradient<U> bias_gradient;
  uint32_t* index;
  Elem *keys, *values, *key_values;  // K and V with keys as lanes, K with channels as lanes
  // Of a block: "rows" are broadcast by a tile, "steps" are its vectors; they differ in pairs
  // alone.
  Elem *query_rows, *grad_rows, *query_steps, *grad_steps;
  T *top, *inverse;          // per query
  V* row_sums;               // per query: of P g, by lanes
  T *p, *ds;                 // [rows][stride]: P, and g until it becomes dS
  Weight* ds_rows;           // dS as the products over keys read it
  Elem *ds_steps, *p_steps;  // dS and P m as the products over queries read them
  T *dropout, *key_sums;

  static int64_t scratch(const DigestArgs& a) {
    Arena arena(nullptr);
    const U u{a};
    Backward b(u, arena);
    return arena.used();
  }
  // dK and dV of a unit, [2][keys][width_d].
  static int64_t key_part_size(const U& u) { return 2 * u.vectors() * L * u.width_d(); }

  int64_t most_tiles() const { return u.args.keys() > kLongRow ? kTilesOfLongRows : kTiles; }

  Backward(const U& u, Arena& arena)
      : u(u), bias(u, most_tiles() * R, arena), bias_gradient(u, arena) {
    const DigestArgs& a = u.args;
    const int64_t rows = most_tiles() * R, steps = rows / U::kStep, stride = u.stride(u.vectors());
    index = arena.take<uint32_t>(u.index_size());
    keys = arena.take<Elem>(u.transposed_size());
    values = arena.take<Elem>(u.transposed_size());
    key_values = arena.take<Elem>(u.values_size());
    query_rows = arena.take<Elem>(rows * u.stride_d());
    grad_rows = arena.take<Elem>(rows * u.stride_d());
    query_steps = U::kPairs ? arena.take<Elem>(steps * u.width_d()) : query_rows;
    grad_steps = U::kPairs ? arena.take<Elem>(steps * u.width_d()) : grad_rows;
    top = arena.take<T>(rows);
    inverse = arena.take<T>(rows);
    row_sums = arena.take<V>(rows);
    p = arena.take<T>(rows * stride);
    ds = arena.take<T>(rows * stride + L);
    ds_rows = U::kPairs ? arena.take<Weight>(rows * stride) : (Weight*)ds;
    ds_steps = U::kPairs ? arena.take<Elem>(steps * stride) : (Elem*)ds;
    p_steps = U::kPairs ? arena.take<Elem>(steps * stride) : (Elem*)p;
    dropout = arena.take<T>(a.dropout_p > 0 ? (rows + 6) * u.factor_stride(u.vectors()) : 0);
    key_sums = arena.take<T>(a.key_parts ? 0 : key_part_size(u));
  }

  void set_unit(int64_t b, int64_t head) {
    const auto k = key_rows<S>(u.args, index, b, head, 0);
    const auto v = key_rows<S>(u.args, index, b, head, 1);
    const auto key = [&](int64_t i) XATTN_LAMBDA_INLINE { return k.row(i); };
    const auto value = [&](int64_t i) XATTN_LAMBDA_INLINE { return v.row(i); };
    const int64_t count = u.args.keys(), padded = u.vectors() * L;
    U::P::transposed(key, count, padded, u.d(), u.steps_d(), keys);
    U::P::transposed(value, count, padded, u.d(), u.steps_d(), values);
    U::P::values(key, count, padded, u.d(), u.width_d(), key_values);
    bias.set_head(head);
  }

  // Queries [i0, i0 + rows), their dO and the statistics of their rows.
  void set_block(int64_t b, int64_t head, int64_t i0, int64_t rows) {
    const DigestArgs& a = u.args;
    const int64_t padded = u.tiles(rows) * R, at = head * u.d();
    const S* q = (const S*)a.qkv + b * a.qkv_stride[0] + i0 * a.qkv_stride[1] + at;
    const S* g = (const S*)a.grad_out + b * a.grad_out_stride[0] + i0 * a.grad_out_stride[1] + at;
    const auto query = [&](int64_t t) XATTN_LAMBDA_INLINE { return q + t * a.qkv_stride[1]; };
    const auto grad = [&](int64_t t) XATTN_LAMBDA_INLINE { return g + t * a.grad_out_stride[1]; };
    U::P::rows(query, rows, padded, u.d(), u.stride_d(), query_rows);
    U::P::rows(grad, rows, padded, u.d(), u.stride_d(), grad_rows);
    if (U::kPairs) {
      U::P::values(query, rows, padded, u.d(), u.width_d(), query_steps);
      U::P::values(grad, rows, padded, u.d(), u.width_d(), grad_steps);
    }
    for (int64_t r = 0; r < padded; ++r) {
      // A row that only fills its tile has no weights.
      top[r] = r < rows ? u.stats(b, head, i0 + r)[0] : T(-kLowest);
      inverse[r] = r < rows ? u.stats(b, head, i0 + r)[1] : T(0);
      row_sums[r] = V{};
    }
    bias.set_block(i0, rows);
  }

  // P and dO V^T of one tile against kC vectors of keys.
  template <int kC>
  XATTN_MEMBER void weights(int64_t r0, int64_t vector) const {
    const int64_t at = r0 * u.stride(u.vectors()) + vector * L, stride = u.stride(u.vectors());
    V acc[R][kC];
    u.logits(acc, query_rows + r0 * u.stride_d(), keys, bias, r0, vector);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      XATTN_UNROLL
      for (int c = 0; c < kC; ++c) {
        const V e = U::exp2(acc[r][c] - splat(top[r0 + r]));
        store(p + at + r * stride + c * L, e * splat(inverse[r0 + r]));
      }
    }
    u.products(acc, grad_rows + r0 * u.stride_d(), values, vector);
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      V sum = row_sums[r0 + r];
      XATTN_UNROLL
      for (int c = 0; c < kC; ++c) {
        store(ds + at + r * stride + c * L, acc[r][c]);
        sum += load(p + at + r * stride + c * L) * acc[r][c];
      }
      row_sums[r0 + r] = sum;
    }
  }

  // Dropout of the block's g, before which it was dO V^T.
  void drop(int64_t rows, const T* factors) const {
    const int64_t stride = u.stride(u.vectors()), factor_stride = u.factor_stride(u.vectors());
    for (int64_t r = 0; r < rows; ++r) {
      V sum{};
      for (int64_t k = 0; k < u.vectors() * L; k += L) {
        const V g = load(ds + r * stride + k) * load(factors + r * factor_stride + k);
        store(ds + r * stride + k, g);
        sum += load(p + r * stride + k) * g;
      }
      row_sums[r] = sum;
    }
  }

  // From P and g of a tile to P m and dS, as the products read them.
  template <bool kDrops>
  XATTN_MEMBER void score_gradients(int64_t r0, const T* factors) const {
    const int64_t stride = u.stride(u.vectors());
    alignas(64) T sums[2 * L];
    V rows[R];
    XATTN_UNROLL
    for (int r = 0; r < R; ++r) rows[r] = row_sums[r0 + r];
    fold_each<Add>(rows, sums);
    for (int64_t k = 0; k < u.vectors() * L; k += L) {
      V weight[R];
      XATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t place = (r0 + r) * stride + k;
        weight[r] = load(p + place);
        rows[r] = weight[r] * (load(ds + place) - splat(sums[r]));
        if constexpr (kDrops) {
          weight[r] *= load(factors + (r0 + r) * u.factor_stride(u.vectors()) + k);
          if (!U::kPairs) store(p + place, weight[r]);
        }
        store(ds + place, rows[r]);
      }
      if constexpr (U::kPairs) {
        XATTN_UNROLL
        for (int r = 0; r < R; ++r) store(ds_rows + (r0 + r) * stride + k, rows[r]);
        XATTN_UNROLL
        for (int r = 0; r < R; r += 2) {
          const int64_t step = (r0 + r) / 2 * stride + k;
          store(ds_steps + step, to_pair(rows[r], rows[r + 1]));
          store(p_steps + step, to_pair(weight[r], weight[r + 1]));
        }
      }
    }
  }

  // sums[k][:] (+)= sum over queries of steps[query][k] * rows[query][:].
  void add_key_sums(const Elem* steps, const Elem* rows, int64_t queries, bool starts,
                    T* sums) const {
    constexpr int kR = U::kKeyRows;
    const int64_t width = u.width_d();
    for (int64_t k = 0; k < u.args.keys(); k += kR) {
      u.template weighted_sum<kR>(steps + k, 1, u.stride(u.vectors()), rows, queries / U::kStep,
                                  [&](int r, int64_t c, V value) XATTN_LAMBDA_INLINE {
                                    T* sum = sums + (k + r) * width + c;
                                    store(sum, starts ? value : load(sum) + value);
                                  });
    }
  }

  // P and dO V^T of the block.
  void score(int64_t tiles) const {
    for_columns<U::kColumns, 1>(u.vectors(), [&](auto group, int64_t first) XATTN_LAMBDA_INLINE {
      for (int64_t r0 = 0; r0 < tiles * R; r0 += R) {
        weights<decltype(group)::value>(r0, first);
      }
    });
  }

  void write_query_gradients(int64_t b, int64_t head, int64_t i0, int64_t rows) const {
    const DigestArgs& a = u.args;
    const int64_t stride = u.stride(u.vectors());
    S* out = (S*)a.grad_qkv + (b * a.tokens + i0) * 3 * a.channels() + head * u.d();
    for (int64_t r0 = 0; r0 < rows; r0 += R) {
      u.template weighted_sum<R>(
          (const Elem*)(ds_rows + r0 * stride), stride / U::kStep, 1, key_values,
          (a.keys() + U::kStep - 1) / U::kStep, [&](int r, int64_t c, V value) XATTN_LAMBDA_INLINE {
            if (r0 + r >= rows) return;
            store_n(out + (r0 + r) * 3 * a.channels() + c, value * T(a.scale), u.d() - c);
          });
    }
  }

  void run_block(int64_t b, int64_t head, int64_t i0, int64_t rows, bool starts, T* sums) {
    const DigestArgs& a = u.args;
    const int64_t tiles = u.tiles(rows);
    set_block(b, head, i0, rows);
    score(tiles);
    if (a.dropout_p > 0) {
      const int64_t stride = u.factor_stride(u.vectors());
      const T* factors = dropout + i0 % 4 * stride;
      dropout_factors(a, index, b * a.heads + head, i0, tiles * R, 0, u.vectors() * L, dropout,
                      stride);
      drop(tiles * R, factors);
      for (int64_t r0 = 0; r0 < tiles * R; r0 += R) score_gradients<true>(r0, factors);
    } else {
      for (int64_t r0 = 0; r0 < tiles * R; r0 += R) score_gradients<false>(r0, nullptr);
    }
    bias_gradient.add(ds, u.stride(u.vectors()), i0, rows);
    write_query_gradients(b, head, i0, rows);
    add_key_sums(ds_steps, query_steps, tiles * R, starts, sums);
    add_key_sums(p_steps, grad_steps, tiles * R, starts, sums + key_part_size(u) / 2);
  }

  void run(int64_t b, int64_t head, int64_t split) {
    const DigestArgs& a = u.args;
    const int64_t begin = split * a.split_rows, end = min_of(begin + a.split_rows, a.tokens);
    const int64_t tiles = u.tiles(end - begin), blocks = (tiles + most_tiles() - 1) / most_tiles();
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
