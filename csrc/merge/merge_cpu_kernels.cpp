// Token merge and enhancement on one core of the CPU, forward and backward, for one ISA.
//
// A cache line of channels of an image at a time goes through a ring of padded rows, which serves
// both convolutions and stays in the first cache; lanes are channels, so the token layout is used
// as it is. The gradient of x is the enhancement's pass over its gradient with the taps flipped,
// plus what every pixel takes of the few windows of the merge that reach it.
#include "common/depthwise_strided.h"
#include "common/depthwise_taps.h"
#include "common/token_rows.h"
#include "merge.h"

namespace xattn::XATTN_ISA {
namespace {

template <class S>
struct Merge {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  const MergeArgs& args;
  ChannelGroup<S> group;
  int64_t image = 0;

  explicit Merge(const MergeArgs& a) : args(a), group(a.group_channels, a.group_channels) {}

  // Rows of the image, for windows of up to `largest`.
  TokenRows<S> rows_of(const void* data, const int64_t* stride, int64_t largest,
                       Arena& arena) const {
    return TokenRows<S>(arena, group, {static_cast<const S*>(data), stride, args.prefix},
                        args.height, args.width, largest);
  }
  int64_t largest() const { return max_of(args.merge.largest, args.enhance.largest); }

  void select_group(int64_t index) { group.select(index, args.group_channels, args.channels); }

  S* out(int64_t token) const {
    return static_cast<S*>(args.out) + (image * args.tokens() + token) * args.channels +
           group.first;
  }
  // Pixel 0 of row y.
  S* out_row(int64_t y) const { return out(args.prefix + y * args.width); }
};

template <class S>
struct Forward : Merge<S> {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  using Merge<S>::args, Merge<S>::group, Merge<S>::image;
  TokenRows<S> x;
  GroupTaps<S> merge, enhance;
  int64_t bytes;

  Forward(const MergeArgs& a, void* memory) : Forward(a, Arena(memory), memory != nullptr) {}
  Forward(const MergeArgs& a, Arena arena, bool real)
      : Merge<S>(a),
        x(this->rows_of(a.x, a.x_stride, this->largest(), arena)),
        merge(group, a.merge, arena, real),
        enhance(group, a.enhance, arena, real),
        bytes(arena.used()) {}

  void run(int64_t begin, int64_t end) {
    x.rows.clear();
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t band = unit % args.bands, index = unit / args.bands / args.batch;
      image = unit / args.bands % args.batch;
      if (index != packed) {
        this->select_group(index);
        merge.pack(false);
        enhance.pack(false);
        packed = index;
      }
      run_band(band * args.height / args.bands, (band + 1) * args.height / args.bands);
    }
  }

  // Rows [first, last).
  void run_band(int64_t first, int64_t last) {
    x.begin(image, first);
    if (first == 0) x.copy_prefix(this->out(0), args.channels);
    int64_t merged = (first + args.stride - 1) / args.stride;
    for (int64_t y = first; y < last; ++y) {
      x.reach(y);
      const bool merges = merge.count() && y == merged * args.stride;
      for (int64_t z = 0; z < group.vectors; ++z) {
        enhance_row(z, y);
        if (merges) merge_row(z, merged);
      }
      merged += merges;
    }
  }

  void enhance_row(int64_t z, int64_t y) const {
    S* const to = this->out_row(y) + z * L;
    const int64_t channels = args.channels;
    group.with_lanes(z, [&](auto lanes) XATTN_LAMBDA_INLINE {
      enhance.convolve(x.rows, y, z, z, [=](int64_t pixel, auto v) XATTN_LAMBDA_INLINE {
        store_n(to + pixel * channels, v, lanes);
      });
    });
  }

  // Row y of the digests.
  void merge_row(int64_t z, int64_t y) const {
    const int64_t first = (image * args.merged_height() + y) * args.merged_width();
    S* to = static_cast<S*>(args.digests) + first * args.channels + group.first;
    const auto rows = x.rows.window_rows(y * args.stride, merge.taps[z].window, z);
    convolve_strided(merge.taps[z], rows, args.stride, args.merged_width(),
                     [&](int64_t pixel, auto v)
                         XATTN_LAMBDA_INLINE { group.put(to + pixel * args.channels, z, v); });
  }
};

template <class S>
struct Backward : Merge<S> {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  using Merge<S>::args, Merge<S>::group, Merge<S>::image;
  const bool merging, enhancing;   // whether the outputs have gradients
  TokenRows<S> x, digests, grads;  // grads: of the enhanced tokens
  GroupTaps<S> merge, merge_sums, enhance, enhance_sums;
  T* merged;  // what a row of x takes of the digests, and as much as windows reach beyond it
  const T** reaching;  // the rows of digests whose windows reach one of x
  int64_t bytes;

  Backward(const MergeArgs& a, void* memory) : Backward(a, Arena(memory), memory != nullptr) {}
  Backward(const MergeArgs& a, Arena arena, bool real)
      : Merge<S>(a),
        merging(a.grad_digests != nullptr),
        enhancing(a.grad_enhanced != nullptr),
        x(this->rows_of(a.x, a.x_stride, this->largest(), arena)),
        digests(arena, group, {static_cast<const S*>(a.grad_digests), a.grad_digests_stride, 0},
                a.merged_height(), a.merged_width(), transposed_window(a.merge.largest, a.stride)),
        grads(this->rows_of(a.grad_enhanced, a.grad_enhanced_stride, a.enhance.largest, arena)),
        merge(group, a.merge, arena, real),
        merge_sums(group, a.merge, arena, real),
        enhance(group, a.enhance, arena, real),
        enhance_sums(group, a.enhance, arena, real) {
    merged = arena.take<T>((a.width + a.stride + a.merge.largest) * L);
    reaching = arena.take<const T*>(a.merge.largest);
    bytes = arena.used();
  }

  void run(const MergeChunk* chunks, int64_t count) {
    const TokenRows<S>* const rings[] = {&x, &digests, &grads};
    for (const TokenRows<S>* each : rings) each->rows.clear();
    for (int64_t i = 0; i < (args.width + args.merge.largest) * L; ++i) merged[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || chunks[i].group != chunks[i - 1].group) {
        this->select_group(chunks[i].group);
        merge.pack(false);
        enhance.pack(true);
      }
      merge_sums.clear(merge);
      enhance_sums.clear(enhance);
      for (image = chunks[i].image_begin; image < chunks[i].image_end; ++image) {
        run_image();
      }
      merge_sums.write(static_cast<T*>(chunks[i].grad_merge), nullptr);
      enhance_sums.write(static_cast<T*>(chunks[i].grad_enhance),
                         static_cast<T*>(chunks[i].grad_bias));
    }
  }

  void run_image() {
    x.begin(image, 0);
    digests.begin(image, 0);
    grads.begin(image, 0);
    if (enhancing) {
      grads.copy_prefix(this->out(0), args.channels);
    } else {
      for (int64_t t = 0; t < args.prefix; ++t) {
        for (int64_t z = 0; z < group.vectors; ++z) group.put(this->out(t), z, vec<T>{});
      }
    }
    int64_t next = 0;   // row of the digests
    int64_t first = 0;  // that reaches row y
    for (int64_t y = 0; y < args.height; ++y) {
      x.reach(y);
      if (merging) digests.reach(next);
      if (enhancing) grads.reach(y);
      const bool merges = merging && y == next * args.stride;
      if (first * args.stride + args.merge.largest / 2 < y) ++first;
      for (int64_t z = 0; z < group.vectors; ++z) {
        if (merges) add_merge_row(z, next);
        if (merging) {
          transpose_row(merge.taps[z], digests.rows, z, first, y, args.stride, reaching, merged);
        }
        if (enhancing) add_enhance_row(z, y);
        write_row(z, y);
      }
      next += merges;
    }
  }

  void add_merge_row(int64_t z, int64_t y) const {
    const PackedTaps<T>& sums = merge_sums.taps[z];
    const auto rows = x.rows.window_rows(y * args.stride, sums.window, z);
    add_strided_gradients(sums.window, digests.rows.row(y, z), rows, args.stride,
                          args.merged_width(), sums.weights);
  }

  void add_enhance_row(int64_t z, int64_t y) const {
    const PackedTaps<T>& sums = enhance_sums.taps[z];
    add_tap_gradients(sums.window, grads.rows.row(y, z), x.rows.window_rows(y, sums.window, z),
                      args.width, sums.weights);
    enhance_sums.add_bias(grads.rows.row(y, z), args.width, z);
  }

  // Row y of the gradient of x.
  void write_row(int64_t z, int64_t y) const {
    S* const to = this->out_row(y) + z * L;
    const T* const more = merged + args.merge.largest / 2 * L;
    const int64_t channels = args.channels;
    group.with_lanes(z, [&](auto lanes) XATTN_LAMBDA_INLINE {
      const auto put = [=](int64_t pixel, auto v) XATTN_LAMBDA_INLINE {
        store_n(to + pixel * channels, v + load(more + pixel * L), lanes);
      };
      if (enhancing) {
        enhance.convolve(grads.rows, y, z, z, put);
      } else {
        for (int64_t pixel = 0; pixel < args.width; ++pixel) put(pixel, vec<T>{});
      }
    });
  }
};

}  // namespace

extern const MergeKernels merge_kernels;
const MergeKernels merge_kernels{pass_scratch<Forward, MergeArgs>,
                                 pass_scratch<Backward, MergeArgs>,
                                 run_pass<Forward, MergeArgs, int64_t, int64_t>,
                                 run_pass<Backward, MergeArgs, const MergeChunk*, int64_t>};

}  // namespace xattn::XATTN_ISA
