// Convolutional position encoding on one core of the CPU, forward and backward, for one ISA.
//
// A group of channels of an image goes through a ring of padded rows; lanes are channels, so the
// token layout is used as it is. The gradient of x is the same pass over grad_out with the taps
// flipped.
#include "common/depthwise_taps.h"
#include "common/token_rows.h"
#include "convpos.h"

namespace xattn::XATTN_ISA {
namespace {

template <class S>
struct Encoding {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  const ConvPosArgs& args;
  ChannelGroup<S> group;

  explicit Encoding(const ConvPosArgs& a) : args(a), group(a.group_channels, a.group_channels) {}

  TokenRows<S> rows_of(const void* data, const int64_t* stride, Arena& arena) const {
    return TokenRows<S>(arena, group, {static_cast<const S*>(data), stride, args.prefix},
                        args.height, args.width, args.conv.largest);
  }

  void select(int64_t index) { group.select(index, args.group_channels, args.channels); }

  S* out(int64_t image, int64_t token) const {
    return static_cast<S*>(args.out) + (image * args.tokens() + token) * args.channels +
           group.first;
  }

  // out = rows + convolution of rows, at row y.
  void write_row(const GroupTaps<S>& taps, const PaddedRows<T>& rows, int64_t image,
                 int64_t y) const {
    const int64_t channels = args.channels;
    for (int64_t z = 0; z < group.vectors; ++z) {
      S* const to = out(image, args.prefix + y * args.width) + z * L;
      const T* const self = rows.row(y, z);
      group.with_lanes(z, [&](auto lanes) XATTN_LAMBDA_INLINE {
        taps.convolve(rows, y, z, z, [=](int64_t x, auto v) XATTN_LAMBDA_INLINE {
          store_n(to + x * channels, load(self + x * L) + v, lanes);
        });
      });
    }
  }
};

template <class S>
struct Forward : Encoding<S> {
  using T = typename ComputeOf<S>::type;
  TokenRows<S> x;
  GroupTaps<S> taps;
  int64_t bytes;

  Forward(const ConvPosArgs& a, void* memory) : Forward(a, Arena(memory), memory != nullptr) {}
  Forward(const ConvPosArgs& a, Arena arena, bool real)
      : Encoding<S>(a),
        x(this->rows_of(a.x, a.x_stride, arena)),
        taps(this->group, a.conv, arena, real),
        bytes(arena.used()) {}

  void run(int64_t begin, int64_t end) {
    const ConvPosArgs& a = this->args;
    x.rows.clear();
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t band = unit % a.bands, index = unit / a.bands % a.groups();
      const int64_t image = unit / a.bands / a.groups();
      if (index != packed) {
        this->select(index);
        taps.pack(false);
        packed = index;
      }
      const int64_t first = band * a.height / a.bands, last = (band + 1) * a.height / a.bands;
      x.begin(image, first);
      if (band == 0) x.copy_prefix(this->out(image, 0), a.channels);
      for (int64_t y = first; y < last; ++y) {
        x.reach(y);
        this->write_row(taps, x.rows, image, y);
      }
    }
  }
};

template <class S>
struct Backward : Encoding<S> {
  using T = typename ComputeOf<S>::type;
  TokenRows<S> x, grads;
  GroupTaps<S> taps, sums;
  int64_t bytes;

  Backward(const ConvPosArgs& a, void* memory) : Backward(a, Arena(memory), memory != nullptr) {}
  Backward(const ConvPosArgs& a, Arena arena, bool real)
      : Encoding<S>(a),
        x(this->rows_of(a.x, a.x_stride, arena)),
        grads(this->rows_of(a.grad_out, a.grad_out_stride, arena)),
        taps(this->group, a.conv, arena, real),
        sums(this->group, a.conv, arena, real),
        bytes(arena.used()) {}

  void run(const ConvPosChunk* chunks, int64_t count) {
    x.rows.clear();
    grads.rows.clear();
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || chunks[i].group != chunks[i - 1].group) {
        this->select(chunks[i].group);
        taps.pack(true);
      }
      sums.clear(taps);
      run(chunks[i]);
    }
  }

  void run(const ConvPosChunk& chunk) {
    for (int64_t image = chunk.image_begin; image < chunk.image_end; ++image) {
      x.begin(image, 0);
      grads.begin(image, 0);
      grads.copy_prefix(this->out(image, 0), this->args.channels);
      for (int64_t y = 0; y < this->args.height; ++y) {
        x.reach(y);
        grads.reach(y);
        this->write_row(taps, grads.rows, image, y);
        sums.add_row(x.rows, grads.rows, y);
        sums.add_bias_row(grads.rows, y);
      }
    }
    sums.write(static_cast<T*>(chunk.grad_weight), static_cast<T*>(chunk.grad_bias));
  }
};

}  // namespace

extern const ConvPosKernels convpos_kernels;
const ConvPosKernels convpos_kernels{pass_scratch<Forward, ConvPosArgs>,
                                     pass_scratch<Backward, ConvPosArgs>,
                                     run_pass<Forward, ConvPosArgs, int64_t, int64_t>,
                                     run_pass<Backward, ConvPosArgs, const ConvPosChunk*, int64_t>};

}  // namespace xattn::XATTN_ISA
