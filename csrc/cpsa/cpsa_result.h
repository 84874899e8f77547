// The last step of a CPSA kernel: a linear whose tiles go straight into the image.
#pragma once

#include "cpsa_products.h"

namespace xattn::XATTN_ISA {

// Writes x, or its gradient, a block of tokens at a time. Patches that stick out of the map and
// groups with fewer channels than lanes go through a dense copy.
template <class S, class M>
class ResultWriter {
 public:
  static constexpr int kLanes = kLanesOf<M>;
  using T = typename M::Acc;

  // What is read next, asked for meanwhile: tokens of x and perhaps of the incoming gradient.
  struct Ahead {
    const Place* places;
    int64_t count;
    bool grad_out;
  };

  ResultWriter(const CpsaArgs& args, const PatchMap<S, M>& map, Arena& arena)
      : map_(map), elements_(args.elements), edge_(arena.take<S>(kBlock * elements_ * kLanes)) {}

  // Puts the tokens in * weight (+ addend [token][element], where given) at their places.
  void write(int64_t count, const Place* places, Factor<M> in, const PackedWeight<M>& weight,
             const Ahead& ahead, const T* addend = nullptr, int64_t addend_stride = 0) const {
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t n = min_of(kBlock, count - first);
      PatchView<S> patches[kBlock];
      for (int64_t t = 0; t < n; ++t) patches[t] = map_.writable(places[first + t], edge(t));
      PatchView<const S> x[kBlock], grad_out[kBlock];
      const bool asks = first + n <= ahead.count;
      for (int64_t t = 0; asks && t < n; ++t) {
        x[t] = map_.upcoming(map_.x(), ahead.places[first + t]);
        grad_out[t] = map_.upcoming(map_.grad_out(), ahead.places[first + t]);
      }
      const auto run = [&](auto sink) {
        linear<M>(n, {in.data + first * in.outer, in.outer, in.step}, weight, sink);
      };
      const auto* next_x = asks ? x : nullptr;
      const auto* next_grad = asks && ahead.grad_out ? grad_out : nullptr;
      if (addend) {
        run(ImageSink<S, M, true>{patches,
                                  elements_,
                                  addend + first * addend_stride,
                                  addend_stride,
                                  {next_x, next_grad}});
      } else {
        run(ImageSink<S, M, false>{patches, elements_, nullptr, 0, {next_x, next_grad}});
      }
      for (int64_t t = 0; t < n; ++t) map_.finish_write(places[first + t], edge(t));
    }
  }

 private:
  static constexpr int64_t kBlock = 16;

  S* edge(int64_t token) const { return edge_ + token * elements_ * kLanes; }

  const PatchMap<S, M>& map_;
  int64_t elements_;
  S* edge_;
};

}  // namespace xattn::XATTN_ISA
