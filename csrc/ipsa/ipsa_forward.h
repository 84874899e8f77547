// Forward of inner-patch attention over a range of units.
#pragma once

#include "ipsa_bias.h"

namespace xattn::XATTN_ISA {

// Units in the order in which they run: groups of windows, in a group one head after the other, so
// that a head's bias serves a whole group from the first-level cache.
struct UnitOrder {
  static constexpr int64_t kGroup = 8;
  const IpsaArgs& a;
  int64_t group, head, in_group;

  UnitOrder(const IpsaArgs& a, int64_t unit) : a(a), group(unit / (kGroup * a.heads)) {
    const int64_t rest = unit - group * kGroup * a.heads;
    head = rest / windows();
    in_group = rest % windows();
  }
  int64_t windows() const { return min_of(kGroup, a.windows() - group * kGroup); }
  int64_t window() const { return group * kGroup + in_group; }
  bool starts_group() const { return head == 0 && in_group == 0; }
  void advance() {
    if (++in_group < windows()) return;
    in_group = 0;
    if (++head < a.heads) return;
    head = 0;
    ++group;
  }
};

template <class U>
struct Forward {
  using S = typename U::Storage;
  using T = typename U::T;
  using Elem = typename U::Elem;
  using Weight = typename U::Weight;

  static int64_t scratch(const IpsaArgs& a) {
    Arena arena(nullptr);
    const U u{a};
    Forward f(u, arena, a.heads);
    return arena.used();
  }

  const U& u;
  Window windows[2][UnitOrder::kGroup];  // of the group at work and the next
  S* zeros;
  Elem *queries, *keys, *values;
  T *spill, *inverse[2], *tail, *dropout;
  Weight* weights[2];  // of two tiles: one is made while the other is used
  char* dense_memory;

  Forward(const U& u, Arena& arena, int64_t heads) : u(u) {
    const IpsaArgs& a = u.args;
    for (auto& group : windows) {
      for (Window& w : group) w = new_window(a, arena);
    }
    zeros = arena.take<S>(2 * u.width_d());
    queries = arena.take<Elem>(u.rows() * u.stride_d());
    keys = arena.take<Elem>(u.stride_d() * u.columns());
    values = arena.take<Elem>(u.steps_n() * u.width_d());
    spill = arena.take<T>(U::kTileRows * u.columns());
    for (auto& each : inverse) each = arena.take<T>(U::kPerRow);
    tail = arena.take<T>(round_up(u.rows(), U::L) + U::L);
    for (auto& each : weights) each = arena.take<Weight>(U::kTileRows * u.weight_stride());
    dropout = arena.take<T>(a.dropout_p > 0 ? (u.n() + 3) / 4 * 4 * u.weight_stride() + U::L : 0);
    dense_memory = arena.take<char>(DenseTerms<U>::bytes(u, heads));
  }

  void locate_group(int64_t group) {
    for (int64_t i = 0; i < UnitOrder::kGroup; ++i) {
      const int64_t index = group * UnitOrder::kGroup + i;
      if (index < u.args.windows()) locate(u.args, index, false, windows[group & 1][i]);
    }
  }

  TokenRows<S> part(const Window& w, int64_t head, int which) const {
    return qkv_rows<U>(u.args, w, head, which, zeros);
  }

  // Weights of a tile times its dropout factors.
  void drop(int64_t i0, Weight* weights) const {
    const int64_t stride = u.weight_stride();
    for (int64_t r = 0; r < U::kTileRows && i0 + r < u.n(); ++r) {
      for (int64_t j = 0; j < u.n(); ++j) {
        Weight* w = weights + r * stride + j;
        store_1(w, load_1(w) * dropout[(i0 + r) * stride + j]);
      }
    }
  }

  void run(const Window& w, int64_t head, const T* bias, const T* mask, const S* next_head,
           const Window& next) const {
    const IpsaArgs& a = u.args;
    const auto q = part(w, head, 0), k = part(w, head, 1), v = part(w, head, 2);
    u.gather_rows(q, queries);
    u.gather_transposed(k, keys);
    u.gather_values(v, values);
    if (u.has_tail()) u.tail_products(queries, k.row(u.n() - 1), tail);
    const typename U::Logits logits{T(a.scale * kLog2e), bias, mask, keys, tail};
    // The softmax of a tile has long chains of dependent steps; the products of the tile before,
    // which come after it here, fill them.
    const auto softmax = [&](auto rows, int64_t tile) XATTN_LAMBDA_INLINE {
      const int64_t i0 = tile * U::kTileRows;
      u.prefetch_written((const S*)a.out + head * u.d(), w.pixel, a.out_pixel, i0,
                         i0 + decltype(rows)::value);
      if (next_head) prefetch_rows(next_head, next, i0, i0 + kPrefetchFirst);
      u.template softmax_tile<decltype(rows)::value>(logits, queries, i0, spill, weights[tile & 1],
                                                     inverse[tile & 1]);
      if (a.dropout_p > 0) drop(i0, weights[tile & 1]);
    };
    const auto emit = [&](auto rows, int64_t tile) XATTN_LAMBDA_INLINE {
      const int64_t i0 = tile * U::kTileRows;
      const T* by = inverse[tile & 1];
      if (kFewMisses && next_head) {
        prefetch_rows(next_head, next, i0 + kPrefetchFirst, i0 + U::kTileRows);
      }
      S* out = (S*)a.out + head * u.d();
      u.template weighted_sum<decltype(rows)::value>(
          (const Elem*)weights[tile & 1], u.weight_stride() / U::kStep, 1, values,
          [&](int r) { return by[r]; },
          [&](int r, int64_t c, auto value) XATTN_LAMBDA_INLINE {
            if (i0 + r >= u.n() || w.pixel[i0 + r] < 0) return;
            u.store_channels(out + w.pixel[i0 + r] * a.out_pixel, c, value);
          });
    };
    const int64_t tiles = u.rows() / U::kTileRows;
    const Int<U::kTileRows> whole;
    for (int64_t tile = 0; tile <= tiles; ++tile) {
      if (tile < tiles) {
        softmax(whole, tile);
      } else if constexpr (U::kLoneRow) {
        softmax(Int<1>{}, tile);
      }
      if (tile > 0) emit(whole, tile - 1);
    }
    if constexpr (U::kLoneRow) emit(Int<1>{}, tiles);
  }

  // The next unit's rows, while this one computes.
  static constexpr int kPrefetchFirst = kFewMisses ? U::kTileRows / 2 : U::kTileRows;
  XATTN_MEMBER void prefetch_rows(const S* head, const Window& w, int64_t from, int64_t to) const {
    const int64_t part = u.args.channels() * (int64_t)sizeof(S);
    const int64_t bytes = u.d() * (int64_t)sizeof(S);
    for (int64_t t = from; t < to && t < u.n(); ++t) {
      if (w.qkv[t] < 0) continue;
      const char* row = (const char*)(head + w.qkv[t]);
      for (int64_t at = 0; at < bytes; at += 64) {
        prefetch_line(row + at);
        prefetch_line(row + at + part);
        prefetch_line(row + at + 2 * part);
      }
    }
  }
};

template <class U>
void forward_units(const IpsaArgs& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename U::Storage;
  const U u{a};
  Arena arena(scratch);
  Forward<U> f(u, arena, a.heads);
  for (int64_t i = 0; i < 2 * u.width_d(); ++i) f.zeros[i] = S{};
  Arena dense(f.dense_memory);
  DenseTerms<U> terms(u, 0, a.heads, dense);
  terms.clear();
  const Dropout dropout = make_dropout(a);
  UnitOrder order(a, begin);
  f.locate_group(order.group);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t window = order.window(), head = order.head;
    if (unit == begin || order.starts_group()) f.locate_group(order.group + 1);
    const Window& w = f.windows[order.group & 1][order.in_group];
    if (a.dropout_p > 0) {
      dropout_factors(u, dropout, (uint64_t)(window * a.heads + head), f.dropout);
    }
    order.advance();
    const S* next = unit + 1 < end ? (const S*)a.qkv + order.head * u.d() : nullptr;
    f.run(w, head, terms.bias(head), terms.mask(w.edge), next,
          f.windows[order.group & 1][order.in_group]);
  }
}

}  // namespace xattn::XATTN_ISA
