// Depthwise convolutions over the tokens of an image, in strips.
//
// A block walks down the rows of an image's part, `rows` at a time. Neighbouring lanes hold
// neighbouring pairs of channels, and each thread a strip of kStrip pixels of a row, so that a
// value that it reads meets up to kStrip taps. The rows around come from a ring in shared memory,
// zero beyond the image; where windows are too large for that, from global memory.
#pragma once

#include "channel_bands.cuh"
#include "depthwise_taps.cuh"

namespace xattn {

constexpr int kStrip = 7;  // the papers' maps are multiples
constexpr int kBlockStrips = 4;
constexpr int kStripThreads = kBlockStrips * kTileChannels / 2;
constexpr int kTileTokens = 32;  // rows of a tile: those of the strips, rounded up to products
constexpr int kRingRadius = 3;   // of the largest windows that the ring serves: 7 x 7
static_assert(kBlockStrips * kStrip <= kTileTokens && kTileTokens % 16 == 0);

// How an image is shared out among blocks.
struct StripPlan {
  int64_t plain;  // tokens that no convolution reaches: those before the image, or all
  int height, width;
  int strips, rows;      // of a step: strips side by side, rows below each other
  int x_tiles, y_parts;  // of an image
  int part_rows;
  int radius;
  bool ring;

  __host__ __device__ int tile_columns() const { return strips * kStrip; }
  __host__ __device__ int ring_columns() const { return tile_columns() + 2 * radius; }
  __host__ __device__ int ring_rows() const { return 2 * (radius + rows); }  // the next step's too
  __host__ __device__ int ring_values() const {
    return ring ? ring_rows() * ring_columns() * kTileChannels : 0;
  }
  __host__ __device__ int64_t blocks() const { return int64_t{1} * x_tiles * y_parts; }
};

// units: blocks that take the same part, of other images or channels. spare: values of the ring
// that shared memory has room for.
inline StripPlan plan_strips(int64_t prefix, int64_t height, int64_t width, int64_t window,
                             int64_t units, int64_t spare) {
  constexpr int64_t kBlocks = 1024, kRowsPerPart = 8;  // about as many as fill a large card twice
  StripPlan plan{};
  plan.plain = prefix;
  plan.height = static_cast<int>(height);
  plan.width = static_cast<int>(width);
  plan.radius = static_cast<int>(std::max<int64_t>(1, window / 2));
  plan.ring = plan.radius <= kRingRadius;
  const int64_t tiles = (width + kBlockStrips * kStrip - 1) / (kBlockStrips * kStrip);
  plan.strips = static_cast<int>(((width + tiles - 1) / tiles + kStrip - 1) / kStrip);
  plan.rows = static_cast<int>(std::min<int64_t>(kBlockStrips / plan.strips, height));
  while (plan.ring_values() > spare && plan.rows > 1) --plan.rows;
  while (plan.ring_values() > spare && plan.strips > 1) --plan.strips;
  plan.ring = plan.ring_values() <= spare && plan.ring;
  plan.x_tiles = static_cast<int>((width + plan.tile_columns() - 1) / plan.tile_columns());
  const int64_t most = std::max<int64_t>(1, height / kRowsPerPart);
  const int64_t parts = std::clamp<int64_t>(kBlocks / (units * plan.x_tiles), 1, most);
  const int64_t rows = ((height + parts - 1) / parts + plan.rows - 1) / plan.rows * plan.rows;
  plan.part_rows = static_cast<int>(rows);
  plan.y_parts = static_cast<int>((height + rows - 1) / rows);
  return plan;
}

// All tokens plain.
inline StripPlan plan_plain(int64_t tokens, int64_t units) {
  constexpr int64_t kBlocks = 1024, kTokens = kBlockStrips * kStrip;
  StripPlan plan{};
  plan.plain = tokens;
  plan.strips = kBlockStrips;
  plan.rows = plan.x_tiles = 1;
  const int64_t most = std::max<int64_t>(1, (tokens + kTokens - 1) / kTokens / 2);
  plan.y_parts = static_cast<int>(std::clamp<int64_t>(kBlocks / units, 1, most));
  return plan;
}

// Some pixels of some rows, as the rows of a tile in shared memory.
struct TokenTile {
  int64_t first;  // token of its first pixel
  int64_t pitch;  // tokens from row to row
  int columns;    // pixels of a row, of the tile
  int valid_rows, valid_columns;

  XATTN_DEVICE int64_t token(int row, int column) const { return first + row * pitch + column; }
};

// Rows of tokens to shared memory, kRow values each; zeros beyond the tile's.
template <int kTokens, int kRow, class T>
XATTN_DEVICE void load_tile(T* s, const ChannelRows<T>& rows, const TokenTile& tile) {
  for (int i = threadIdx.x; i < kTokens * kTileChunks<T>; i += kStripThreads) {
    const int t = i / kTileChunks<T>, chunk = i % kTileChunks<T>;
    const int row = t / tile.columns, column = t - row * tile.columns;
    const bool valid = row < tile.valid_rows && column < tile.valid_columns;
    load_chunk(s + t * kRow + chunk * kChunk<T>, rows, tile.token(row, column), chunk, valid);
  }
}

// Tile `i` of the plain tokens, one row.
XATTN_DEVICE TokenTile plain_tile(const StripPlan& plan, int64_t i) {
  constexpr int kColumns = kBlockStrips * kStrip;
  const int64_t first = i * kColumns, left = plan.plain - first;
  return {first, 0, kColumns, 1, left < kColumns ? static_cast<int>(left) : kColumns};
}
XATTN_DEVICE int64_t plain_tiles(const StripPlan& plan) {
  return (plan.plain + kBlockStrips * kStrip - 1) / (kBlockStrips * kStrip);
}

// The part of an image that a block walks down.
struct StripPart {
  int x, y_begin, y_end;

  XATTN_DEVICE StripPart(const StripPlan& plan, int block)
      : x(block % plan.x_tiles * plan.tile_columns()),
        y_begin(block / plan.x_tiles * plan.part_rows),
        y_end(min(y_begin + plan.part_rows, plan.height)) {}
  XATTN_DEVICE TokenTile tile(const StripPlan& plan, int y) const {
    return {plan.plain + static_cast<int64_t>(y) * plan.width + x, plan.width, plan.tile_columns(),
            min(plan.rows, y_end - y), min(plan.tile_columns(), plan.width - x)};
  }
};

// A thread's pair of channels and strip of a tile.
struct StripItem {
  int pair, index;  // index: of the strip
  int row, column;
  bool active;

  // Of `channels`, in tiles of `rows` rows of `strips` strips.
  XATTN_DEVICE StripItem(int channels, int strips, int rows) {
    const int pairs = (min(channels, kTileChannels) + 1) / 2;
    pair = static_cast<int>(threadIdx.x) % pairs;
    index = static_cast<int>(threadIdx.x) / pairs;
    row = index / strips;
    column = index % strips * kStrip;
    active = row < rows;
  }
};

// Rows of an image around those that a block is at, in slots that are used again.
template <class T>
struct Ring {
  T* memory;
  int columns, slots;
  int first;  // row of slot 0
  int x;      // pixel of column 0

  XATTN_DEVICE Ring(T* memory, const StripPlan& plan, const StripPart& part)
      : memory(memory),
        columns(plan.ring_columns()),
        slots(plan.ring_rows()),
        first(part.y_begin - plan.radius),
        x(part.x - plan.radius) {}
  XATTN_DEVICE int slot(int y) const { return (y - first) % slots; }
  XATTN_DEVICE int next(int slot) const { return slot + 1 < slots ? slot + 1 : 0; }
  XATTN_DEVICE T* at(int slot, int column) const {
    return memory + (slot * columns + column) * kTileChannels;
  }

  // Rows y .. y + count - 1 of `image`, whose row 0 is its first pixel.
  XATTN_DEVICE void fill(const ChannelRows<T>& image, const StripPlan& plan, int y,
                         int count) const {
    for (int slot_now = slot(y); count > 0; --count, ++y, slot_now = next(slot_now)) {
      const bool row_valid = y >= 0 && y < plan.height;
      for (int i = threadIdx.x; i < columns * kTileChunks<T>; i += kStripThreads) {
        const int chunk = i % kTileChunks<T>, column = i / kTileChunks<T>;
        if (chunk * kChunk<T> >= image.channels) continue;
        const bool valid = row_valid && x + column >= 0 && x + column < plan.width;
        load_chunk(at(slot_now, column) + chunk * kChunk<T>, image,
                   static_cast<int64_t>(y) * plan.width + x + column, chunk, valid);
      }
    }
  }
};

using Strip = float[kStrip][2];

// sum += the convolution of a strip that begins at `column` of a tile in row y, for channels
// c, c + 1 of all, `pair` of the ring; transposed: of the mirrored kernel.
template <int kWindow, bool kTransposed, class T>
XATTN_DEVICE void convolve_ring(Strip& sum, const Ring<T>& ring, const TapTable& taps, int y,
                                int column, int pair, int c, int radius) {
  constexpr int kReach = kWindow / 2, kWide = kStrip + kWindow - 1;
  const int step = kTransposed ? -1 : 1;
  int tap = taps.centre() - step * kReach * (taps.largest + 1);
  int slot = ring.slot(y - kReach);
#pragma unroll 1
  for (int dy = 0; dy < kWindow; ++dy, slot = ring.next(slot), tap += step * taps.largest) {
    Pack<float, 2> weight[kWindow], near[kWide];
#pragma unroll
    for (int dx = 0; dx < kWindow; ++dx) weight[dx] = taps.pair(tap + step * dx, c);
    const T* row = ring.at(slot, column + radius - kReach) + 2 * pair;
#pragma unroll
    for (int i = 0; i < kWide; ++i) near[i] = load_pair(row + i * kTileChannels);
#pragma unroll
    for (int dx = 0; dx < kWindow; ++dx) {
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        sum[i][0] += near[i + dx].v[0] * weight[dx].v[0];
        sum[i][1] += near[i + dx].v[1] * weight[dx].v[1];
      }
    }
  }
}

// The same from global memory, for any window; x: the strip's first pixel.
template <bool kTransposed, class T>
XATTN_DEVICE void convolve_global(Strip& sum, const ChannelRows<T>& image, const StripPlan& plan,
                                  const TapTable& taps, int y, int x, int pair, int c, int window) {
  const int reach = window / 2, step = kTransposed ? -1 : 1;
  for (int dy = max(-reach, -y); dy <= min(reach, plan.height - 1 - y); ++dy) {
    for (int dx = -reach; dx <= reach; ++dx) {
      const auto weight = taps.pair(taps.centre() + step * (dy * taps.largest + dx), c);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const int column = x + dx + i;
        if (column < 0 || column >= plan.width) continue;
        const int64_t n = static_cast<int64_t>(y + dy) * plan.width + column;
        const auto near = load_pair(image, n, 2 * pair);
        sum[i][0] += near.v[0] * weight.v[0];
        sum[i][1] += near.v[1] * weight.v[1];
      }
    }
  }
}

// A block's way down its part of an image, `rows` rows of pixels a step, with the rows around them
// in a ring.
template <class T>
struct StripWalk {
  const StripPlan& plan;
  ChannelRows<T> image;  // row 0: the image's first pixel
  StripPart part;
  Ring<T> ring;

  // block: of those of an image; memory: the ring's.
  XATTN_DEVICE StripWalk(const StripPlan& plan, const ChannelRows<T>& image, int block, T* memory)
      : plan(plan), image(image), part(plan, block), ring(memory, plan, part) {}

  // load(stage, tile) starts the copies of what a step needs besides the ring, into stage 0 or 1;
  // step(stage, y) follows once they are there, while those of the next step are on their way.
  template <class Load, class Step>
  XATTN_DEVICE void run(Load load, Step step) const {
    __syncthreads();  // all have done with what the memory held before
    if (plan.ring) ring.fill(image, plan, ring.first, 2 * plan.radius + plan.rows);
    load(0, part.tile(plan, part.y_begin));
    ptx::cp_async_commit();
    int stage = 0;
    for (int y = part.y_begin; y < part.y_end; y += plan.rows, stage ^= 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (y + plan.rows < part.y_end) {
        if (plan.ring) ring.fill(image, plan, y + plan.radius + plan.rows, plan.rows);
        load(stage ^ 1, part.tile(plan, y + plan.rows));
        ptx::cp_async_commit();
      }
      step(stage, y);
    }
  }
};

// The same for the tokens that no convolution reaches, each tile in stage 0: step(tile).
template <class Load, class Step>
XATTN_DEVICE void walk_plain(const StripPlan& plan, int block, Load load, Step step) {
  for (int64_t i = block; i < plain_tiles(plan); i += plan.blocks()) {
    const TokenTile tile = plain_tile(plan, i);
    __syncthreads();  // all have done with the tile before
    load(0, tile);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    step(tile);
  }
}

// The convolutions of a thread, a strip a step.
template <class T>
struct StripConvolution {
  const StripWalk<T>& walk;
  const TapTable& taps;
  StripItem item;
  int c;  // the item's first channel

  XATTN_DEVICE void begin_with_bias(Strip& sum) const {
    const auto bias = taps.bias(c);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      sum[i][0] = bias.v[0];
      sum[i][1] = bias.v[1];
    }
  }

  // sum += the convolution of the item's strip, in a step that begins at row step_y.
  template <bool kTransposed>
  XATTN_DEVICE void add(Strip& sum, int step_y) const {
    const int y = step_y + item.row, window = taps.window(c);
    if (!walk.plan.ring) {
      convolve_global<kTransposed>(sum, walk.image, walk.plan, taps, y, walk.part.x + item.column,
                                   item.pair, c, window);
    } else if (window <= 3) {
      add_ring<3, kTransposed>(sum, y);
    } else if (window <= 5) {
      add_ring<5, kTransposed>(sum, y);
    } else {
      add_ring<7, kTransposed>(sum, y);
    }
  }

 private:
  template <int kWindow, bool kTransposed>
  XATTN_DEVICE void add_ring(Strip& sum, int y) const {
    convolve_ring<kWindow, kTransposed>(sum, walk.ring, taps, y, item.column, item.pair, c,
                                        walk.plan.radius);
  }
};

}  // namespace xattn
