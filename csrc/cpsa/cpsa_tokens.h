// Between the image and the scratch of a CPSA kernel.
//
// The lanes of a vector are neighbouring channels: in a channels-last image they lie side by side,
// so a patch of any size is a row of vectors and nothing is ever transposed. A "unit" is one such
// group of channels of one image; it has `patches` tokens of `elements` vectors each.
#pragma once

#include "common/arena.h"
#include "common/tiles.h"
#include "cpsa.h"

namespace xattn::XATTN_ISA {

// Tokens in scratch, as the tiles read them. A product over elements reads `by_element`, a product
// over tokens reads `by_token`. With one value a step both are the same [token][element] vectors;
// with pairs, by_element is [token][element / 2] and by_token is [token / 2][element].
template <class M>
struct Tokens {
  typename M::Elem* by_element;
  typename M::Elem* by_token;
  int64_t token_stride;  // of by_element
  int64_t step_stride;   // of by_token
};

// The layout that tokens of `elements` values take (a multiple of the step).
template <class M>
struct TokenLayout {
  static constexpr int kLanes = kLanesOf<M>;
  int64_t elements;

  int64_t token_stride() const { return elements / M::kStep * kLanes; }
  int64_t step_stride() const { return elements * kLanes; }

  Tokens<M> take(Arena& arena, int64_t tokens, bool by_element, bool by_token) const {
    using Elem = typename M::Elem;
    Tokens<M> t{nullptr, nullptr, token_stride(), step_stride()};
    if (M::kStep == 1 || by_element) t.by_element = arena.take<Elem>(tokens * token_stride());
    if (M::kStep == 1) {
      t.by_token = t.by_element;
    } else if (by_token) {
      t.by_token = arena.take<Elem>(round_up(tokens, M::kStep) / M::kStep * step_stride());
    }
    return t;
  }
};

// The same tokens from `first` on (a multiple of the step).
template <class M>
XATTN_INLINE Tokens<M> from(const Tokens<M>& t, int64_t first) {
  return {t.by_element ? t.by_element + first * t.token_stride : nullptr,
          t.by_token ? t.by_token + first / M::kStep * t.step_stride : nullptr, t.token_stride,
          t.step_stride};
}

// Where one token lies: its group of channels (`lanes` of the vector are channels) and the corner
// of its patch. With lanes == 0 it is a placeholder: it reads as zeros and is not written.
struct Place {
  int64_t image, channel, lanes, y, x;
};

// A patch in memory: value p of the first channel at data + offset[p], followed by as many values
// as a vector has lanes.
template <class S>
struct PatchView {
  S* data;
  const int64_t* offset;
};

// An activation [B, H, W, C] with dense channels.
template <class S>
struct ImageView {
  S* data;
  int64_t image_stride, row_stride, pixel_stride;
  const int64_t* offset;  // of the values of a patch from its corner

  S* at(const Place& p, int64_t row, int64_t column) const {
    return data + p.image * image_stride + (p.y + row) * row_stride +
           (p.x + column) * pixel_stride + p.channel;
  }
};

// Units and tokens of a call, and their way into scratch and back.
template <class S, class M>
class PatchMap {
 public:
  static constexpr int kLanes = kLanesOf<M>;
  using T = typename M::Acc;

  PatchMap(const CpsaArgs& args, Arena& arena)
      : args_(args), groups_((args.channels + kLanes - 1) / kLanes) {
    int64_t** const tables[] = {&x_offset_, &grad_out_offset_, &out_offset_, &dense_offset_};
    for (int64_t** table : tables) *table = arena.take<int64_t>(args.elements);
    edge_ = arena.take<S>(M::kStep * args.elements * kLanes);
  }

  // Fills the tables, once the arena has memory.
  void begin() const {
    const int64_t pixel = args_.channels, row = args_.width * pixel;
    for (int64_t p = 0; p < args_.elements; ++p) {
      const int64_t y = p / args_.patch_w, x = p % args_.patch_w;
      x_offset_[p] = y * args_.x_stride[1] + x * args_.x_stride[2];
      grad_out_offset_[p] = y * args_.grad_out_stride[1] + x * args_.grad_out_stride[2];
      out_offset_[p] = y * row + x * pixel;
      dense_offset_[p] = p * kLanes;
    }
  }

  ImageView<const S> x() const {
    return {static_cast<const S*>(args_.x), args_.x_stride[0], args_.x_stride[1], args_.x_stride[2],
            x_offset_};
  }
  ImageView<const S> grad_out() const {
    return {static_cast<const S*>(args_.grad_out), args_.grad_out_stride[0],
            args_.grad_out_stride[1], args_.grad_out_stride[2], grad_out_offset_};
  }
  ImageView<S> out() const {
    const int64_t pixel = args_.channels, row = args_.width * pixel;
    return {static_cast<S*>(args_.out), args_.height * row, row, pixel, out_offset_};
  }

  int64_t units() const { return args_.batch * groups_; }

  // The tokens of units [first, last), `slots` places for each; more than its tokens are
  // placeholders.
  void list_tokens(int64_t first, int64_t last, int64_t slots, Place* places) const {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t image = unit / groups_, channel = unit % groups_ * kLanes;
      const int64_t lanes = min_of<int64_t>(kLanes, args_.channels - channel);
      for (int64_t t = 0; t < slots; ++t) {
        *places++ = {image, channel, t < args_.patches ? lanes : 0,
                     t / args_.patches_x * args_.patch_h, t % args_.patches_x * args_.patch_w};
      }
    }
  }

  // `count` tokens into `to`; count is a multiple of the step.
  void gather(const ImageView<const S>& image, const Place* places, int64_t count,
              const Tokens<M>& to) const {
    for (int64_t t = 0; t < count; t += M::kStep) {
      PatchView<const S> patch[M::kStep];
      for (int i = 0; i < M::kStep; ++i) {
        patch[i] = readable(image, places[t + i], edge_ + i * args_.elements * kLanes);
      }
      write_tokens(patch, from(to, t));
    }
  }

  // Where a token will be gathered from; some harmless memory where that is not one whole patch.
  PatchView<const S> upcoming(const ImageView<const S>& image, const Place& p) const {
    return is_whole(p) ? PatchView<const S>{image.at(p, 0, 0), image.offset}
                       : PatchView<const S>{edge_, dense_offset_};
  }

  // Where the values of a token of the result go: the image itself where the patch lies inside it
  // and all lanes are channels, else `edge`, from which finish_write() copies what is wanted.
  PatchView<S> writable(const Place& p, S* edge) const {
    const ImageView<S> image = out();
    return is_whole(p) ? PatchView<S>{image.at(p, 0, 0), image.offset}
                       : PatchView<S>{edge, dense_offset_};
  }
  void finish_write(const Place& p, const S* edge) const {
    if (is_whole(p)) return;
    const ImageView<S> image = out();
    for (int64_t r = 0; r < rows_inside(p); ++r) {
      for (int64_t c = 0; c < columns_inside(p); ++c) {
        __builtin_memcpy(image.at(p, r, c), edge + (r * args_.patch_w + c) * kLanes,
                         p.lanes * sizeof(S));
      }
    }
  }

 private:
  bool is_whole(const Place& p) const {
    return p.lanes == kLanes && p.y + args_.patch_h <= args_.height &&
           p.x + args_.patch_w <= args_.width;
  }
  int64_t rows_inside(const Place& p) const {
    return p.lanes == 0 ? 0 : min_of(args_.patch_h, args_.height - p.y);
  }
  int64_t columns_inside(const Place& p) const { return min_of(args_.patch_w, args_.width - p.x); }

  // The patch in the image, or a dense copy in `edge` with zeros for what lies outside.
  PatchView<const S> readable(const ImageView<const S>& image, const Place& p, S* edge) const {
    if (is_whole(p)) return {image.at(p, 0, 0), image.offset};
    __builtin_memset(edge, 0, args_.elements * kLanes * sizeof(S));
    for (int64_t r = 0; r < rows_inside(p); ++r) {
      for (int64_t c = 0; c < columns_inside(p); ++c) {
        __builtin_memcpy(edge + (r * args_.patch_w + c) * kLanes, image.at(p, r, c),
                         p.lanes * sizeof(S));
      }
    }
    return {edge, dense_offset_};
  }

  // One token.
  void write_tokens(const PatchView<const S> (&patch)[1], const Tokens<M>& to) const {
    for (int64_t p = 0; p < args_.elements; ++p) {
      store(to.by_element + p * kLanes, load(patch[0].data + patch[0].offset[p]));
    }
  }
  // A pair of tokens, two elements at a time, into the orders that `to` has. The partner of an odd
  // last element is zero.
  void write_tokens(const PatchView<const S> (&patch)[2], const Tokens<M>& to) const {
    if constexpr (M::kStep == 2) {
      alignas(64) static constexpr S kZero[kLanes] = {};
      for (int64_t p = 0; p < args_.elements; p += 2) {
        const bool has_partner = p + 1 < args_.elements;
        const S* pixel[2][2];  // [token][element]
        XATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          pixel[i][0] = patch[i].data + patch[i].offset[p];
          pixel[i][1] = has_partner ? patch[i].data + patch[i].offset[p + 1] : kZero;
        }
        XATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (to.by_element) {
            store(to.by_element + i * to.token_stride + p / 2 * kLanes,
                  to_pair(pixel[i][0], pixel[i][1]));
          }
          if (to.by_token) {
            store(to.by_token + (p + i) * kLanes, to_pair(pixel[0][i], pixel[1][i]));
          }
        }
      }
    }
  }

  const CpsaArgs& args_;
  int64_t groups_;
  int64_t *x_offset_, *grad_out_offset_, *out_offset_, *dense_offset_;
  S* edge_;
};

}  // namespace xattn::XATTN_ISA
