// Depthwise convolutions whose windows stand some pixels apart, and their gradients, for one vector
// of channels: row after row of a map whose pixels are vectors that lie side by side.
#pragma once

#include "depthwise.h"

namespace xattn::XATTN_ISA {

// Results that are in registers at a time, at most.
constexpr int kStridedPixels = 4;

// use(x, bias + sum over ky, kx of taps[ky][x * step + kx] * weights[ky][kx]) for x < count.
template <int kWindow, class T, class F>
XATTN_INLINE void convolve_strided_of(const PackedTaps<T>& packed, WindowRows<T> taps, int64_t step,
                                      int64_t count, F use) {
  constexpr int L = Lanes<T>::n;
  const int64_t window = kWindow ? kWindow : packed.window;
  for_blocks<kStridedPixels>(count, [&](auto size, int64_t x) XATTN_LAMBDA_INLINE {
    constexpr int n = decltype(size)::value;
    vec<T> acc[2][n] = {};  // of even and of odd kx: two chains a pixel
    XATTN_UNROLL
    for (int p = 0; p < n; ++p) acc[0][p] = load(packed.bias);
    for (int64_t ky = 0; ky < window; ++ky) {
      const T* in = taps[ky] + x * step * L;
      const T* weights = packed.weights + ky * window * L;
      XATTN_UNROLL
      for (int64_t kx = 0; kx < window; ++kx) {
        const auto weight = load(weights + kx * L);
        XATTN_UNROLL
        for (int p = 0; p < n; ++p) acc[kx % 2][p] += load(in + (p * step + kx) * L) * weight;
      }
    }
    XATTN_UNROLL
    for (int p = 0; p < n; ++p) use(x + p, acc[0][p] + acc[1][p]);
  });
}

template <class T, class F>
XATTN_INLINE void convolve_strided(const PackedTaps<T>& packed, WindowRows<T> taps, int64_t step,
                                   int64_t count, F use) {
  if (packed.window == 7) return convolve_strided_of<7>(packed, taps, step, count, use);
  convolve_strided_of<0>(packed, taps, step, count, use);
}

// The side of a window over the results that holds all those which reach a pixel of the image.
XATTN_INLINE int64_t transposed_window(int64_t window, int64_t step) {
  return 2 * ((window / 2 + step - 1) / step) + 1;
}

// sums[ky][kx] += sum over x of grad[x] * taps[ky][x * step + kx], for window rows [ky, ky +
// kRows).
template <int kWindow, int kRows, class T>
XATTN_INLINE void add_strided_gradients_of(const T* grad, WindowRows<T> taps, int64_t step,
                                           int64_t count, T* sums) {
  constexpr int L = Lanes<T>::n;
  vec<T> acc[kRows][kWindow] = {};
  for (int64_t x = 0; x < count; ++x) {
    const auto g = load(grad + x * L);
    XATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const T* in = taps[r] + x * step * L;
      XATTN_UNROLL
      for (int k = 0; k < kWindow; ++k) acc[r][k] += g * load(in + k * L);
    }
  }
  XATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    XATTN_UNROLL
    for (int k = 0; k < kWindow; ++k) {
      T* sum = sums + (r * kWindow + k) * L;
      store(sum, load(sum) + acc[r][k]);
    }
  }
}

template <class T>
__attribute__((noinline)) void add_strided_gradients(int64_t window, const T* grad,
                                                     WindowRows<T> taps, int64_t step,
                                                     int64_t count, T* sums) {
  constexpr int L = Lanes<T>::n;
  if (window == 7) {
    for_columns<kTapRows<7>, 1>(7, [&](auto rows, int64_t ky) XATTN_LAMBDA_INLINE {
      add_strided_gradients_of<7, decltype(rows)::value>(grad, taps.from(ky), step, count,
                                                         sums + ky * 7 * L);
    });
    return;
  }
  for (int64_t ky = 0; ky < window; ++ky) {
    for (int64_t kx = 0; kx < window; ++kx) {
      add_strided_gradients_of<1, 1>(grad, taps.from(ky, kx * L), step, count,
                                     sums + (ky * window + kx) * L);
    }
  }
}

// out[x * step + kx] += grad[x] * weights[kx] for x < count: one window row of the transposed
// convolution.
template <class T>
XATTN_INLINE void add_transposed(const T* weights, int64_t window, const T* grad, int64_t step,
                                 int64_t count, T* out) {
  constexpr int L = Lanes<T>::n;
  for (int64_t x = 0; x < count; ++x) {
    const auto g = load(grad + x * L);
    T* to = out + x * step * L;
    for (int64_t k = 0; k < window; ++k) {
      store(to + k * L, load(to + k * L) + g * load(weights + k * L));
    }
  }
}

// out[x * step + kx] = sum over r < kRows of grads[r][x] * weights[kx + r * row_step], where the
// step is known: what later windows still add to stays in registers.
template <int kWindow, int kStep, int kRows, class T>
XATTN_INLINE void write_transposed_of(const T* weights, int64_t row_step, const T* const* grads,
                                      int64_t count, T* out) {
  constexpr int L = Lanes<T>::n;
  vec<T> acc[kWindow] = {};
  for (int64_t x = 0; x < count; ++x) {
    XATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto g = load(grads[r] + x * L);
      XATTN_UNROLL
      for (int k = 0; k < kWindow; ++k) acc[k] += g * load(weights + r * row_step + k * L);
    }
    XATTN_UNROLL
    for (int k = 0; k < kStep; ++k) store(out + (x * kStep + k) * L, acc[k]);
    XATTN_UNROLL
    for (int k = 0; k < kWindow; ++k) acc[k] = k + kStep < kWindow ? acc[k + kStep] : vec<T>{};
  }
  XATTN_UNROLL
  for (int k = 0; k < kWindow - kStep; ++k) store(out + (count * kStep + k) * L, acc[k]);
}

// out = row y of the gradient of the image, of vector z of the gradients `grads` of the results.
// `first`: the first row of results whose window reaches y. `rows` has room for as many pointers as
// a window has rows. Pixel 0 is at out + (window / 2) * lanes, and as much as windows reach is
// written before and behind the row.
template <class T>
__attribute__((noinline)) void transpose_row(const PackedTaps<T>& packed,
                                             const PaddedRows<T>& grads, int64_t z, int64_t first,
                                             int64_t y, int64_t step, const T** rows, T* out) {
  constexpr int L = Lanes<T>::n;
  const int64_t window = packed.window, radius = window / 2, count = grads.width;
  int64_t found = 0;
  for (int64_t row = first; row < grads.height && row * step - radius <= y; ++row) {
    rows[found++] = grads.row(row, z);
  }
  // The window rows of `rows` at row y, from the first on upwards.
  const T* weights = packed.weights + (y + radius - first * step) * window * L;
  const int64_t row_step = -step * window * L;
  if (window == 7 && step == 4 && found > 0) {  // of CabViT
    with_constant<2>(found, [&](auto n) XATTN_LAMBDA_INLINE {
      write_transposed_of<7, 4, decltype(n)::value>(weights, row_step, rows, count, out);
    });
    return;
  }
  for (int64_t x = 0; x < (count - 1) * step + window; ++x) store(out + x * L, vec<T>{});
  for (int64_t row = 0; row < found; ++row) {
    add_transposed(weights + row * row_step, window, rows[row], step, count, out);
  }
}

}  // namespace xattn::XATTN_ISA
