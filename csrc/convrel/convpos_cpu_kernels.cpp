// Convolutional position encoding on one core of the CPU, forward and backward, for one ISA.
//
// A group of channels of an image goes through a ring of padded rows; lanes are channels, so the
// token layout is used as it is. The gradient of x is the same pass over grad_out with the taps
// flipped.
#include "common/depthwise_taps.h"
#include "convpos.h"

namespace xattn::XATTN_ISA {
namespace {

// One activation, and a group of its channels.
template <class S>
struct Tokens {
  const S* data;
  const int64_t* stride;  // of images, of tokens

  const S* at(int64_t image, int64_t token, int64_t channel) const {
    return data + image * stride[0] + token * stride[1] + channel;
  }
};

template <class S>
struct Encoding {
  using T = typename ComputeOf<S>::type;
  static constexpr int L = Lanes<T>::n;
  const ConvPosArgs& args;
  ChannelGroup<S> group;
  Tokens<S> x, grad_out;

  explicit Encoding(const ConvPosArgs& a)
      : args(a),
        group(a.group_channels, a.group_channels),
        x{static_cast<const S*>(a.x), a.x_stride},
        grad_out{static_cast<const S*>(a.grad_out), a.grad_out_stride} {}

  PaddedRows<T> take_rows(Arena& arena) const {
    return PaddedRows<T>(arena, args.height, args.width, group.stride, args.conv.largest, 1);
  }

  void select(int64_t index) {
    group.first = index * args.group_channels;
    group.channels = min_of(args.group_channels, args.channels - group.first);
    group.vectors = (group.channels + L - 1) / L;
  }

  S* out(int64_t image, int64_t token) const {
    return static_cast<S*>(args.out) + (image * args.tokens() + token) * args.channels +
           group.first;
  }

  // Rows of `from` into the ring, up to what row y needs; `ready` is the first that is not in it.
  void load_rows(const Tokens<S>& from, int64_t image, int64_t y, const PaddedRows<T>& rows,
                 int64_t& ready) const {
    for (; ready < min_of(args.height, y + 1 + rows.margin); ++ready) {
      group.gather_ahead(from.at(image, args.prefix + ready * args.width, group.first),
                         from.stride[1], args.width, rows.row(ready));
    }
  }

  void copy_prefix(const Tokens<S>& from, int64_t image) const {
    group.for_vectors(from.at(image, 0, group.first), from.stride[1], args.prefix,
                      [&](int64_t z, int64_t t, auto v)
                          XATTN_LAMBDA_INLINE { group.put(out(image, t), z, v); });
  }

  // out = rows + convolution of rows, at row y.
  void write_row(const GroupTaps<S>& taps, const PaddedRows<T>& rows, int64_t image,
                 int64_t y) const {
    S* to = out(image, args.prefix + y * args.width);
    const T* row = rows.row(y);
    for (int64_t z = 0; z < group.vectors; ++z) {
      taps.convolve(rows, y, z, [&](int64_t pixel, auto conv) XATTN_LAMBDA_INLINE {
        const auto self = load(row + pixel * group.stride + z * L);
        group.put(to + pixel * args.channels, z, self + conv);
      });
    }
  }
};

template <class S>
struct Forward : Encoding<S> {
  using T = typename ComputeOf<S>::type;
  PaddedRows<T> rows;
  GroupTaps<S> taps;
  int64_t bytes;

  Forward(const ConvPosArgs& a, void* memory) : Forward(a, Arena(memory), memory != nullptr) {}
  Forward(const ConvPosArgs& a, Arena arena, bool real)
      : Encoding<S>(a),
        rows(this->take_rows(arena)),
        taps(this->group, a.conv, arena, real),
        bytes(arena.used()) {}

  void run(int64_t begin, int64_t end) {
    const ConvPosArgs& a = this->args;
    rows.clear();
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t band = unit % a.bands, index = unit / a.bands % a.groups();
      const int64_t image = unit / a.bands / a.groups();
      if (index != packed) {
        this->select(index);
        taps.pack(false);
        packed = index;
      }
      if (band == 0) this->copy_prefix(this->x, image);
      const int64_t first = band * a.height / a.bands, last = (band + 1) * a.height / a.bands;
      int64_t ready = max_of<int64_t>(0, first - rows.margin);
      for (int64_t y = first; y < last; ++y) {
        this->load_rows(this->x, image, y, rows, ready);
        this->write_row(taps, rows, image, y);
      }
    }
  }
};

template <class S>
struct Backward : Encoding<S> {
  using T = typename ComputeOf<S>::type;
  PaddedRows<T> rows, grads;
  GroupTaps<S> taps, sums;
  int64_t bytes;

  Backward(const ConvPosArgs& a, void* memory) : Backward(a, Arena(memory), memory != nullptr) {}
  Backward(const ConvPosArgs& a, Arena arena, bool real)
      : Encoding<S>(a),
        rows(this->take_rows(arena)),
        grads(this->take_rows(arena)),
        taps(this->group, a.conv, arena, real),
        sums(this->group, a.conv, arena, real),
        bytes(arena.used()) {}

  void run(const ConvPosChunk* chunks, int64_t count) {
    rows.clear();
    grads.clear();
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
      this->copy_prefix(this->grad_out, image);
      int64_t ready = 0, grads_ready = 0;
      for (int64_t y = 0; y < this->args.height; ++y) {
        this->load_rows(this->x, image, y, rows, ready);
        this->load_rows(this->grad_out, image, y, grads, grads_ready);
        this->write_row(taps, grads, image, y);
        sums.add_row(rows, grads, y);
        sums.add_bias_row(grads, y);
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
