// The depthwise weights of a group of channels, packed for the kernels, and their gradients.
#pragma once

#include "channel_group.h"
#include "depthwise.h"

namespace xattn::XATTN_ISA {

// How weights get into packed taps and their gradients out.
template <class S>
struct TapPacker {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  const DepthwiseWeights& from;

  // Of channels [first, first + count); `flipped` for the transposed convolution, without bias.
  void pack(int64_t first, int64_t count, bool flipped, PackedTaps<T>& to) const {
    to.window = 1;
    for (int64_t c = 0; c < count; ++c) to.window = max_of(to.window, from.window[first + c]);
    const int64_t taps = to.window * to.window;
    if (same_window(first, count)) {
      for_squares(taps, [&](int64_t tap, int64_t size, vec<T>(&square)[L]) {
        for (int64_t c = 0; c < L; ++c) {
          square[c] = c < count ? load_n(weight(first + c) + tap, size) : vec<T>{};
        }
        transpose(square);
        for (int64_t i = 0; i < size; ++i) {
          const int64_t at = tap + i;
          store(to.weights + (flipped ? taps - 1 - at : at) * L, square[i]);
        }
      });
    } else {
      for (int64_t i = 0; i < taps * L; ++i) to.weights[i] = 0;
      for (int64_t c = 0; c < count; ++c) {
        for_window(to.window, first + c, [&](int64_t own, int64_t packed) {
          to.weights[(flipped ? taps - 1 - packed : packed) * L + c] =
              load_1(weight(first + c) + own);
        });
      }
    }
    const S* bias = flipped ? nullptr : static_cast<const S*>(from.bias);
    store(to.bias, bias ? load_n(bias + first, count) : vec<T>{});
  }

  // Sums [window * window][lanes] of packed taps, written as the channels' own gradients.
  void unpack(int64_t first, int64_t count, const PackedTaps<T>& sums, T* weight_gradients) const {
    const int64_t taps = sums.window * sums.window;
    if (same_window(first, count)) {
      for_squares(taps, [&](int64_t tap, int64_t size, vec<T>(&square)[L]) {
        for (int64_t i = 0; i < L; ++i) {
          square[i] = i < size ? load(sums.weights + (tap + i) * L) : vec<T>{};
        }
        transpose(square);
        for (int64_t c = 0; c < count; ++c) {
          store_n(weight_gradients + from.offset[first + c] + tap, square[c], size);
        }
      });
      return;
    }
    for (int64_t c = 0; c < count; ++c) {
      T* gradients = weight_gradients + from.offset[first + c];
      for_window(sums.window, first + c, [&](int64_t own, int64_t packed) {
        gradients[own] = sums.weights[packed * L + c];
      });
    }
  }

  const S* weight(int64_t channel) const {
    return static_cast<const S*>(from.weight) + from.offset[channel];
  }
  bool same_window(int64_t first, int64_t count) const {
    for (int64_t c = 1; c < count; ++c) {
      if (from.window[first + c] != from.window[first]) return false;
    }
    return true;
  }
  // f(first tap, how many, room for a square of lanes) for all taps of channels of one window:
  // transposing squares is much faster than moving values one by one.
  template <class F>
  void for_squares(int64_t taps, F f) const {
    vec<T> square[L];
    for (int64_t tap = 0; tap < taps; tap += L) f(tap, min_of<int64_t>(L, taps - tap), square);
  }

  // f(index among the channel's own taps, index in a packed window).
  template <class F>
  void for_window(int64_t packed_window, int64_t channel, F f) const {
    const int64_t own = from.window[channel], border = (packed_window - own) / 2;
    for (int64_t y = 0; y < own; ++y) {
      for (int64_t x = 0; x < own; ++x) {
        f(y * own + x, (y + border) * packed_window + x + border);
      }
    }
  }
};

// One PackedTaps for every vector of a group: weights, or the sums of their gradients.
template <class S>
struct GroupTaps {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  const ChannelGroup<S>& group;
  const DepthwiseWeights& from;
  PackedTaps<T>* taps;

  // Without `real` memory the arena only counts.
  GroupTaps(const ChannelGroup<S>& group, const DepthwiseWeights& from, Arena& arena, bool real)
      : group(group), from(from) {
    taps = arena.take<PackedTaps<T>>(count());
    for (int64_t z = 0; z < count(); ++z) {
      T* weights = arena.take<T>(from.largest * from.largest * L);
      T* bias = arena.take<T>(L);
      if (real) taps[z] = {0, weights, bias};
    }
  }

  // Vectors, of which the group may have fewer later; 0 where there is no convolution.
  int64_t count() const { return from.largest > 0 ? group.vectors : 0; }

  // The weights of the group's channels; `flipped` for the transposed convolution.
  void pack(bool flipped) const {
    for (int64_t z = 0; z < count(); ++z) {
      TapPacker<S>{from}.pack(group.first + z * L, group.lanes(z), flipped, taps[z]);
    }
  }

  // use(x, vector z of the convolution at pixel x) for row y of `image`, whose line `line` it is.
  template <class F>
  XATTN_MEMBER void convolve(const PaddedRows<T>& image, int64_t y, int64_t z, int64_t line,
                             F use) const {
    convolve_row(taps[z], image.window_rows(y, taps[z].window, line), image.width, use,
                 [](int64_t) XATTN_LAMBDA_INLINE {});
  }
  // The same as a line, for windows that leave `use` no registers. ahead(x) asks for memory, a
  // pixel at a time, where the arithmetic hides it.
  template <class F>
  const T* convolve_line(const PaddedRows<T>& image, int64_t y, int64_t z, int64_t line,
                         F ahead) const {
    XATTN_ISA::convolve_line(taps[z], image.window_rows(y, taps[z].window, line), image.width,
                             image.convolved, ahead);
    return image.convolved;
  }

  // Begins sums of gradients, with the windows of `weights`.
  void clear(const GroupTaps& weights) const {
    for (int64_t z = 0; z < count(); ++z) {
      taps[z].window = weights.taps[z].window;
      for (int64_t i = 0; i < taps[z].window * taps[z].window * L; ++i) taps[z].weights[i] = 0;
      store(taps[z].bias, vec<T>{});
    }
  }

  // Adds row y of grad (*) image, where grad is the gradient of the convolution's output.
  void add_row(const PaddedRows<T>& image, const PaddedRows<T>& grad, int64_t y) const {
    for (int64_t z = 0; z < count(); ++z) {
      add_tap_gradients(taps[z].window, grad.row(y, z), image.window_rows(y, taps[z].window, z),
                        image.width, taps[z].weights);
    }
  }
  // Adds row y of grad to the sums of the bias.
  void add_bias_row(const PaddedRows<T>& grad, int64_t y) const {
    for (int64_t z = 0; z < count(); ++z) add_bias(grad.row(y, z), grad.width, z);
  }
  // The same of vector z alone.
  void add_bias(const T* line, int64_t width, int64_t z) const {
    vec<T> sums[4] = {};                      // four chains of additions
    for (int64_t x = 0; x < width; x += 4) {  // zeros beyond the row
      XATTN_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] += load(line + (x + i) * L);
    }
    store(taps[z].bias, load(taps[z].bias) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }

  // Writes the sums as gradients in the layout of the weights; grad_bias may be null.
  void write(T* grad_weight, T* grad_bias) const {
    for (int64_t z = 0; z < count(); ++z) {
      TapPacker<S>{from}.unpack(group.first + z * L, group.lanes(z), taps[z], grad_weight);
      if (grad_bias) store_n(grad_bias + group.first + z * L, load(taps[z].bias), group.lanes(z));
    }
  }
};

}  // namespace xattn::XATTN_ISA
