// Packing: rows of a tensor, wherever they lie, as the operands of the register tiles.
#pragma once

#include "tiles.h"

namespace xattn::XATTN_ISA {

// S: storage type of the rows. M: policy of the tiles. `row(t)` gives the address of row t; rows
// hold d dense channels.
template <class S, class M>
struct Pack {
  using Elem = typename M::Elem;
  static constexpr int L = kLanesOf<M>;
  static constexpr bool kPairs = M::kStep == 2;

  // Elements [c * L, (c + 1) * L) of a row, zero beyond its d channels.
  static XATTN_MEMBER vec<Elem> elems(const S* row, int64_t c, int64_t d) {
    if constexpr (kPairs) {
      const int64_t left = d - c * 2 * L;
      if (left >= 2 * L) return load_as<vu32>(row + c * 2 * L);
      uint16_t padded[2 * L] = {};
      __builtin_memcpy(padded, row + c * 2 * L, left * sizeof(uint16_t));
      return load_as<vu32>(padded);
    } else {
      return load_n(row + c * L, d - c * L);
    }
  }

  // out[t][:] = row t, for tiles that broadcast it; rows [count, padded) are zero.
  template <class Row>
  static XATTN_MEMBER void rows(Row row, int64_t count, int64_t padded, int64_t d, int64_t stride,
                                Elem* out) {
    for (int64_t t = 0; t < count; ++t) {
      const S* from = row(t);
      for (int64_t c = 0; c * L < stride; ++c) store(out + t * stride + c * L, elems(from, c, d));
    }
    for (int64_t i = count * stride; i < padded * stride; i += L) store(out + i, vec<Elem>{});
  }

  // out[t / L][step][t % L] = element `step` of row t: lanes are rows, L of them lie together. Rows
  // [count, padded) are zero; `padded` is a multiple of L.
  template <class Row>
  static XATTN_MEMBER void transposed(Row row, int64_t count, int64_t padded, int64_t d,
                                      int64_t steps, Elem* out) {
    for (int64_t t = 0; t < padded; t += L, out += steps * L) {
      const S* from[L];
      for (int i = 0; i < L; ++i) from[i] = row(min_of(t + i, count - 1));
      for (int64_t c = 0; c * L < steps; ++c) {
        vec<Elem> square[L];
        XATTN_UNROLL
        for (int i = 0; i < L; ++i) square[i] = elems(from[i], c, d);
        if (t + L > count) {
          for (int i = 0; i < L; ++i) square[i] = t + i < count ? square[i] : vec<Elem>{};
        }
        transpose(square);
        const int64_t left = min_of<int64_t>(L, steps - c * L);
        XATTN_UNROLL
        for (int i = 0; i < L; ++i) {
          if (i < left) store(out + (c * L + i) * L, square[i]);
        }
      }
    }
  }

  // out[s][:] = channels of the M::kStep rows of step s: lanes are channels. Rows beyond `count`
  // are zero; `padded`, a multiple of M::kStep, of them are written.
  template <class Row>
  static XATTN_MEMBER void values(Row row, int64_t count, int64_t padded, int64_t d, int64_t width,
                                  Elem* out) {
    const int64_t steps = (count + M::kStep - 1) / M::kStep;
    for (int64_t s = 0; s < steps; ++s) {
      const S* from = row(s * M::kStep);
      const bool both = kPairs && s * 2 + 1 < count;
      const S* second = both ? row(s * 2 + 1) : from;
      for (int64_t c = 0; c < width; c += L) {
        if constexpr (kPairs) {
          if (both && d - c >= L) {
            store(out + s * width + c, to_pair(from + c, second + c));
          } else {
            const vfloat high = both ? load_n(second + c, d - c) : vfloat{};
            store(out + s * width + c, to_pair(load_n(from + c, d - c), high));
          }
        } else {
          store(out + s * width + c, load_n(from + c, d - c));
        }
      }
    }
    for (int64_t i = steps * width; i < padded / M::kStep * width; i += L) {
      store(out + i, vec<Elem>{});
    }
  }
};

}  // namespace xattn::XATTN_ISA
