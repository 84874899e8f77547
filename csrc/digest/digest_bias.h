// The bias of the logits, never formed for all queries and keys: a query reads its row out of a
// line of its grid row.
#pragma once

#include "digest_unit.h"

namespace xattn::XATTN_ISA::digest {

// Rows of the table of one head, mirrored: [grid_w][stride], where row |dx| holds at
// dy + grid_h - 1 what belongs to (|dy|, |dx|).
struct Mirror {
  static int64_t stride(const DigestArgs& a, int64_t lanes) {
    return round_up(2 * a.grid_h - 1 + lanes, lanes);
  }
  static int64_t size(const DigestArgs& a, int64_t lanes) {
    return a.grid_w * stride(a, lanes) + lanes;
  }
};

// The first n lanes of v, the others zero.
template <class V>
XATTN_INLINE V first_lanes(V v, int64_t n) {
  using Bits = decltype(v == v);
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  Bits lane;
  for (int l = 0; l < lanes; ++l) lane[l] = l;
  const auto count = (decltype(lane[0] + 0))min_of<int64_t>(n, lanes);
  return (V)((Bits)v & (lane < Bits{} + count));
}

// Bias of one head, times log2 e, on a block of queries.
template <class U>
struct BlockBias {
  using T = typename U::T;
  static constexpr int L = U::L;

  const U& u;
  int64_t most_rows, head = -1;
  T* mirror;
  T* rest;      // by key, beyond the patches: 0 for the prefix, then the digests' bias, then kNever
  T* zeros;     // by key: of queries in the prefix, or without a table
  T* lines;     // of the block's grid rows: [slots][line_size]
  T* straddle;  // [rows][L]: the vector in which the patches end
  const T** row;  // [rows]: of each query, by key, up to the vector in which the patches end

  BlockBias(const U& u, int64_t most_rows, Arena& arena) : u(u), most_rows(most_rows) {
    const DigestArgs& a = u.args;
    mirror = arena.take<T>(a.bias_table ? Mirror::size(a, L) : 0);
    rest = arena.take<T>((u.vectors() + 1) * L);
    zeros = arena.take<T>(zeros_size());
    lines = arena.take<T>(a.bias_table ? slots() * line_size() : 0);
    straddle = arena.take<T>(most_rows * L);
    row = arena.take<const T*>(most_rows);
  }
  // A line holds at (dx + grid_w - 1) * grid_h + y what a query of its grid row adds to the key dx
  // columns to its right, in row y.
  int64_t line_size() const { return round_up((2 * u.args.grid_w - 1) * u.args.grid_h + L, L); }
  int64_t slots() const {
    return min_of(u.args.grid_h, (most_rows - 1) / u.args.grid_w + 2);  // grid rows in a block
  }
  int64_t whole() const { return u.args.patches() / L; }  // vectors of patches alone
  int64_t zeros_size() const { return (whole() + 1) * L; }

  void clear() {
    for (int64_t k = 0; k < zeros_size(); ++k) zeros[k] = 0;
  }

  void set_head(int64_t wanted) {
    if (wanted == head) return;
    const DigestArgs& a = u.args;
    using S = typename U::Storage;
    head = wanted;
    const S* digest_bias = a.digest_bias ? (const S*)a.digest_bias + head * a.digests : nullptr;
    for (int64_t k = whole() * L; k < (u.vectors() + 1) * L; ++k) {
      const bool biased = digest_bias && k >= a.tokens && k < a.keys();
      rest[k] = k >= a.keys() ? T(kNever) : T(0);
      if (biased) rest[k] = load_1(digest_bias + k - a.tokens) * T(kLog2e);
    }
    if (!a.bias_table) return;
    const int64_t stride = Mirror::stride(a, L);
    const S* table = (const S*)a.bias_table + head * a.patches();
    for (int64_t dy = 0; dy < a.grid_h; ++dy) {
      for (int64_t dx = 0; dx < a.grid_w; ++dx) {
        T* center = mirror + dx * stride + a.grid_h - 1;
        center[dy] = center[-dy] = load_1(table + dy * a.grid_w + dx) * T(kLog2e);
      }
    }
  }

  // Queries [i0, i0 + rows); the rows up to most_rows only fill the last tile.
  void set_block(int64_t i0, int64_t rows) {
    const DigestArgs& a = u.args;
    const int64_t h = a.grid_h, w = a.grid_w;
    const T* line = nullptr;
    int64_t slot = 0, x = w;  // of the next patch; x = w before the first and at the end of a line
    for (int64_t r = 0; r < most_rows; ++r) {
      const int64_t patch = i0 + r - a.prefix;
      row[r] = zeros;
      if (r < rows && patch >= 0 && a.bias_table) {
        if (x == w) {
          T* next = lines + slot++ * line_size();
          fill_line(patch / w, next);
          line = next;
          x = patch % w;
        }
        row[r] = line + (w - 1 - x++) * h;
      }
      const auto of_patches = first_lanes(load(row[r] + whole() * L), a.patches() - whole() * L);
      store(straddle + r * L, of_patches + load(rest + whole() * L));
    }
  }
  void fill_line(int64_t y, T* line) const {
    const int64_t h = u.args.grid_h, w = u.args.grid_w, stride = Mirror::stride(u.args, L);
    for (int64_t dx = 1 - w; dx < w; ++dx) {
      const T* from = mirror + (dx < 0 ? -dx : dx) * stride + h - 1 - y;
      T* to = line + (dx + w - 1) * h;
      // Whole vectors: what they write too much, the next column overwrites.
      for (int64_t i = 0; i < h; i += L) store(to + i, load(from + i));
    }
  }

  // Calls f(term), where term(r) is the bias of query `first + r` on vector v of the keys.
  template <class F>
  XATTN_MEMBER void with_column(int64_t v, int64_t first, F f) const {
    if (v < whole()) {
      f([&](int r) XATTN_LAMBDA_INLINE { return load(row[first + r] + v * L); });
    } else if (v == whole()) {
      f([&](int r) XATTN_LAMBDA_INLINE { return load(straddle + (first + r) * L); });
    } else {
      const auto all = load(rest + v * L);
      f([&](int) XATTN_LAMBDA_INLINE { return all; });
    }
  }
};

// Sums of the logits' gradient into the bins of the table and of the digests, for one unit.
template <class U>
struct BiasGradient {
  using T = typename U::T;
  static constexpr int L = U::L;

  const U& u;
  T *mirror, *digests;

  BiasGradient(const U& u, Arena& arena) : u(u) {
    mirror = arena.take<T>(u.args.table_parts ? Mirror::size(u.args, L) : 0);
    digests = arena.take<T>(u.args.digest_parts ? u.args.digests + L : 0);
  }

  void clear() {
    const DigestArgs& a = u.args;
    if (a.table_parts) {
      for (int64_t i = 0; i < Mirror::size(a, L); ++i) mirror[i] = 0;
    }
    if (a.digest_parts) {
      for (int64_t i = 0; i < a.digests + L; ++i) digests[i] = 0;
    }
  }

  // ds: [rows][stride] of queries [i0, i0 + rows).
  void add(const T* ds, int64_t stride, int64_t i0, int64_t rows) {
    const DigestArgs& a = u.args;
    int64_t r = a.table_parts ? max_of<int64_t>(0, a.prefix - i0) : rows;
    while (r < rows) {
      const int64_t patch = i0 + r - a.prefix, x = patch % a.grid_w;
      const int64_t count = min_of(rows - r, a.grid_w - x);
      add_grid_row(ds + r * stride, stride, patch / a.grid_w, x, x + count);
      r += count;
    }
    if (!a.digest_parts) return;
    for (int64_t m = 0; m < a.digests; m += L) {
      vec<T> sum{};  // of the block alone: short sums of short sums err less than one long one
      for (int64_t r = 0; r < rows; ++r) sum += load(ds + r * stride + a.tokens + m);
      store(digests + m, load(digests + m) + sum);
    }
  }
  // Queries (y, [x0, x1)). All that one bin gets from them is added up in registers.
  XATTN_MEMBER void add_grid_row(const T* ds, int64_t stride, int64_t y, int64_t x0, int64_t x1) {
    const int64_t h = u.args.grid_h, w = u.args.grid_w;
    for (int64_t dx = 0; dx < w; ++dx) {
      for (int64_t ky = 0; ky < h; ky += L) {
        vec<T> left{}, right{};  // keys in columns x - dx and x + dx
        for (int64_t x = max_of(x0, dx); x < x1; ++x) {
          left += load(ds + (x - x0) * stride + (x - dx) * h + ky);
        }
        for (int64_t x = x0; dx > 0 && x < min_of(x1, w - dx); ++x) {
          right += load(ds + (x - x0) * stride + (x + dx) * h + ky);
        }
        T* bins = mirror + dx * Mirror::stride(u.args, L) + h - 1 - y + ky;
        store(bins, load(bins) + first_lanes(left + right, h - ky));
      }
    }
  }

  // Writes this unit's share.
  void finish(int64_t b, int64_t split, int64_t head) const {
    const DigestArgs& a = u.args;
    const int64_t part = (b * a.splits + split) * a.heads + head;
    if (a.table_parts) {
      T* out = (T*)a.table_parts + part * a.patches();
      for (int64_t dy = 0; dy < a.grid_h; ++dy) {
        for (int64_t dx = 0; dx < a.grid_w; ++dx) {
          const T* center = mirror + dx * Mirror::stride(a, L) + a.grid_h - 1;
          out[dy * a.grid_w + dx] = dy == 0 ? center[0] : center[dy] + center[-dy];
        }
      }
    }
    if (a.digest_parts) {
      T* out = (T*)a.digest_parts + part * a.digests;
      for (int64_t i = 0; i < a.digests; ++i) out[i] = digests[i];
    }
  }
};

}  // namespace xattn::XATTN_ISA::digest
