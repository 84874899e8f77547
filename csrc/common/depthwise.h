// Depthwise convolutions over tokens on one core: lanes are channels, so a tap is one vector of
// weights and nothing is ever transposed.
#pragma once

#include "arena.h"
#include "depthwise_weights.h"
#include "loops.h"

namespace xattn::XATTN_ISA {

// Pixels whose results are in registers at a time; 7 divides the maps of the models.
constexpr int kPixels = 7;
// Pixels that one load of a weight gradient's input serves.
constexpr int kGradPixels = 4;

// The rows of an image that a window reads: row ky begins at top[ky] + corner.
template <class T>
struct WindowRows {
  const T* const* top;
  int64_t corner;

  const T* operator[](int64_t ky) const { return top[ky] + corner; }
  // What a smaller window reads whose corner is at value `at` of window row ky.
  WindowRows from(int64_t ky, int64_t at = 0) const { return {top + ky, corner + at}; }
};

// The latest rows of an image in scratch, with zeros on all sides so that no tap needs a check. A
// row is a line of pixels for each vector of channels: the vectors of neighbours lie side by side,
// so that what a window reads is at constant distances.
template <class T>
struct PaddedRows {
  static constexpr int L = Lanes<T>::n;
  T* data;
  T* zeros;          // a row outside the image
  const T** around;  // [margin + height + margin]: where each row begins, or the zeros
  T* convolved;      // a line of a convolution's results
  int64_t height, width, line, margin, capacity, row_size;

  // `ahead` rows are processed together, with windows of up to `largest`. A row is a vector longer
  // than its lines, so that a window's rows do not share a set of the cache.
  PaddedRows(Arena& arena, int64_t height, int64_t width, int64_t vectors, int64_t largest,
             int64_t ahead)
      : height(height),
        width(width),
        line((round_up(width, kPixels) + kGradPixels + 2 * (largest / 2)) * L),
        margin(largest / 2),
        capacity(min_of(height, ahead + 2 * (largest / 2))),
        row_size(vectors * line + L) {
    data = arena.take<T>(capacity * row_size);
    zeros = arena.take<T>(row_size);
    around = arena.take<const T*>(height + 2 * margin);
    convolved = arena.take<T>(round_up(width, kPixels) * L);
  }

  // Once per scratch: rows are written inside the image alone.
  void clear() const {
    for (int64_t i = 0; i < capacity * row_size; ++i) data[i] = 0;
    for (int64_t i = 0; i < row_size; ++i) zeros[i] = 0;
    for (int64_t i = 0; i < height + 2 * margin; ++i) around[i] = zeros;
    for (int64_t y = 0; y < height; ++y) around[margin + y] = data + (y % capacity) * row_size;
  }

  // Vector z of pixel 0 of row y, which is in the image and among the latest.
  T* row(int64_t y, int64_t z = 0) const {
    return const_cast<T*>(around[margin + y]) + z * line + margin * L;
  }

  // What a window around pixel 0 of row y reads of vector z.
  WindowRows<T> window_rows(int64_t y, int64_t window, int64_t z) const {
    return {around + margin + y - window / 2, z * line + (margin - window / 2) * L};
  }
};

// The weights of one vector of channels, [window * window][lanes]: as wide as the widest window
// among its channels, the others centred in zeros.
template <class T>
struct PackedTaps {
  int64_t window;
  T* weights;
  T* bias;  // [lanes]
};

// use(x, bias + sum over ky, kx of taps[ky][x + kx] * weights[ky][kx]) for every pixel of a row.
// ahead(x) asks for memory that is needed later.
template <int kWindow, class T, class F, class G>
XATTN_INLINE void convolve_row_of(const PackedTaps<T>& packed, WindowRows<T> taps, int64_t width,
                                  F use, G ahead) {
  constexpr int L = Lanes<T>::n;
  const int64_t window = kWindow ? kWindow : packed.window;
  const auto bias = load(packed.bias);
  for (int64_t x = 0; x < width; x += kPixels) {
    vec<T> acc[kPixels];
    XATTN_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      acc[p] = bias;
      ahead(x + p);
    }
    XATTN_ROLLED  // or values are spilled for a next row
    for (int64_t ky = 0; ky < window; ++ky) {
      const T* in = taps[ky] + x * L;
      const T* weights = packed.weights + ky * window * L;
      if constexpr (kWindow > 0) {  // sums, weights and a pixel fill 16 registers at a window of 7
        vec<T> weight[kWindow];
        XATTN_UNROLL
        for (int kx = 0; kx < kWindow; ++kx) weight[kx] = load(weights + kx * L);
        XATTN_UNROLL
        for (int i = 0; i < kPixels + kWindow - 1; ++i) {
          const auto pixel = load(in + i * L);
          XATTN_UNROLL
          for (int kx = 0; kx < kWindow; ++kx) {
            if (i - kx >= 0 && i - kx < kPixels) acc[i - kx] += pixel * weight[kx];
          }
        }
      } else {
        for (int64_t kx = 0; kx < window; ++kx) {
          const auto weight = load(weights + kx * L);
          XATTN_UNROLL
          for (int p = 0; p < kPixels; ++p) acc[p] += load(in + (p + kx) * L) * weight;
        }
      }
    }
    if (x + kPixels <= width) {  // without conditions, which the sums would be put off behind
      XATTN_UNROLL
      for (int p = 0; p < kPixels; ++p) use(x + p, acc[p]);
    } else {
      XATTN_UNROLL
      for (int p = 0; p < kPixels - 1; ++p) {
        if (x + p < width) use(x + p, acc[p]);
      }
    }
  }
}

template <class T, class F, class G>
XATTN_INLINE void convolve_row(const PackedTaps<T>& packed, WindowRows<T> taps, int64_t width,
                               F use, G ahead) {
  switch (packed.window) {
    case 3:
      return convolve_row_of<3>(packed, taps, width, use, ahead);
    case 5:
      return convolve_row_of<5>(packed, taps, width, use, ahead);
    case 7:
      return convolve_row_of<7>(packed, taps, width, use, ahead);
    default:
      return convolve_row_of<0>(packed, taps, width, use, ahead);
  }
}

// The same to a line of pixels, with room for whole kPixels of them.
template <class T, class F>
__attribute__((noinline)) void convolve_line(const PackedTaps<T>& packed, WindowRows<T> taps,
                                             int64_t width, T* out, F ahead) {
  const auto keep = [=](int64_t x, auto v) XATTN_LAMBDA_INLINE { store(out + x * Lanes<T>::n, v); };
  convolve_row(packed, taps, round_up(width, kPixels), keep, ahead);
}

// sums[ky][kx] += sum over x of grad[x] * taps[ky][x + kx], for window rows [ky, ky + kRows).
template <int kWindow, int kRows, class T>
XATTN_INLINE void add_tap_gradients_of(const T* grad, WindowRows<T> taps, int64_t width, T* sums) {
  constexpr int L = Lanes<T>::n;
  vec<T> acc[kRows][kWindow] = {};
  for (int64_t x = 0; x < width; x += kGradPixels) {
    vec<T> g[kGradPixels];
    XATTN_UNROLL
    for (int i = 0; i < kGradPixels; ++i) g[i] = load(grad + (x + i) * L);
    XATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      XATTN_UNROLL
      for (int j = 0; j < kWindow + kGradPixels - 1; ++j) {
        const auto in = load(taps[r] + (x + j) * L);
        XATTN_UNROLL
        for (int i = 0; i < kGradPixels; ++i) {
          if (j - i >= 0 && j - i < kWindow) acc[r][j - i] += g[i] * in;
        }
      }
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

// Window rows whose accumulators fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
template <int kWindow>
constexpr int kTapRows = 21 / kWindow;
#else
template <int kWindow>
constexpr int kTapRows = kWindow > 5 ? 1 : 10 / kWindow;
#endif

template <int kWindow, class T>
XATTN_INLINE void add_tap_gradients_of(const T* grad, WindowRows<T> taps, int64_t width, T* sums) {
  for_columns<kTapRows<kWindow>, 1>(kWindow, [&](auto rows, int64_t ky) XATTN_LAMBDA_INLINE {
    add_tap_gradients_of<kWindow, decltype(rows)::value>(grad, taps.from(ky), width,
                                                         sums + ky * kWindow * Lanes<T>::n);
  });
}

// sums[ky][kx] += sum over the pixels of a row of grad[x] * taps[ky][x + kx]. `grad` is a line of a
// PaddedRows: beyond the image it is zero.
template <class T>
__attribute__((noinline)) void add_tap_gradients(int64_t window, const T* grad, WindowRows<T> taps,
                                                 int64_t width, T* sums) {
  switch (window) {
    case 3:
      return add_tap_gradients_of<3>(grad, taps, width, sums);
    case 5:
      return add_tap_gradients_of<5>(grad, taps, width, sums);
    case 7:
      return add_tap_gradients_of<7>(grad, taps, width, sums);
    default:
      for (int64_t ky = 0; ky < window; ++ky) {
        for (int64_t kx = 0; kx < window; ++kx) {
          add_tap_gradients_of<1, 1>(grad, taps.from(ky, kx * Lanes<T>::n), width,
                                     sums + (ky * window + kx) * Lanes<T>::n);
        }
      }
  }
}

}  // namespace xattn::XATTN_ISA
