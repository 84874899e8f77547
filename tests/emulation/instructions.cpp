// Shuffles, votes, ldmatrix, mma and cp.async.
#include "emulator.h"

#include <algorithm>

namespace cuda_host {

// ----------------------------------------------------------------------------- of a warp

void exchange(const char* name, unsigned mask, int line, Exchange& e) {
  exchange_data(name, mask, line, &e, [](void** data, unsigned all) {
    for (unsigned left = all; left != 0; left &= left - 1) {
      auto* to = static_cast<Exchange*>(data[__builtin_ctz(left)]);
      const int source = to->source & 31;
      if ((all >> source & 1) == 0) {
        fault("a shuffle reads lane %d, outside its mask %08x", source, all);
      }
      to->out = static_cast<const Exchange*>(data[source])->in;
    }
  });
}

void warp_barrier(unsigned mask, int line) {
  exchange_data("syncwarp", mask, line, nullptr, [](void**, unsigned all) {
    if (all == ~0u) ++block.warp_epoch[self->warp];
  });
}

unsigned ballot(unsigned mask, int predicate, int line) {
  unsigned vote = predicate != 0;
  exchange_data("ballot", mask, line, &vote, [](void** data, unsigned all) {
    unsigned result = 0;
    for (unsigned left = all; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      result |= *static_cast<unsigned*>(data[lane]) << lane;
    }
    for (unsigned left = all; left != 0; left &= left - 1) {
      *static_cast<unsigned*>(data[__builtin_ctz(left)]) = result;
    }
  });
  return vote;
}

// ------------------------------------------------------------------------------ ldmatrix

struct Ldmatrix {
  uint32_t* r;
  const void* row;  // 8 values
  int count;
  bool transposed;
};

static void load_matrices(void** data, unsigned) {
  const auto lane = [&](int l) { return static_cast<const Ldmatrix*>(data[l]); };
  const bool transposed = lane(0)->transposed;
  for (int i = 0; i < lane(0)->count; ++i) {
    uint16_t m[8][8];
    for (int j = 0; j < 8; ++j) memcpy(m[j], lane(i * 8 + j)->row, 16);
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, c = l % 4 * 2;
      const uint32_t low = transposed ? m[c][g] : m[g][c];
      const uint32_t high = transposed ? m[c + 1][g] : m[g][c + 1];
      lane(l)->r[i] = low | high << 16;
    }
  }
}

void ldmatrix(uint32_t* r, uintptr_t address, int count, bool transposed) {
  static const char* const kNames[2][2] = {{"ldmatrix.x2", "ldmatrix.x4"},
                                           {"ldmatrix.x2.trans", "ldmatrix.x4.trans"}};
  Ldmatrix l{r, reinterpret_cast<const void*>(address), count, transposed};
  if (self->lane < 8 * count) {  // the others' addresses are ignored
    const void* pc = __builtin_return_address(0);
    must_be_shared(l.row, 16, "ldmatrix", pc);
    check(l.row, 16, false, pc);
  }
  exchange_data(kNames[transposed][count == 4], ~0u, 0, &l, load_matrices);
}

// ----------------------------------------------------------------------------------- mma

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

static float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
static float from_f16(uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  _Float16 value;
  memcpy(&value, &half, 2);
  return static_cast<float>(value);
}
static float from_tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000); }

// D [16, 8] += A [16, kDepth] B [kDepth, 8] of all lanes. A register holds 32 / kBits neighbours
// along the depth; the registers of A alternate between rows g and g + 8.
template <int kDepth, int kBits, float (*kValue)(uint32_t)>
static void multiply_add(void** data, unsigned) {
  constexpr int kEach = 32 / kBits;
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const Mma& m = *static_cast<const Mma*>(data[l]);
    const int g = l / 4, c = l % 4;
    for (int h = 0; h < kEach; ++h) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][c * kEach + i / 2 * kDepth / 2 + h] = kValue(m.a[i] >> kBits * h);
      }
      for (int i = 0; i < 2; ++i) {
        b[c * kEach + i * kDepth / 2 + h][g] = kValue(m.b[i] >> kBits * h);
      }
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][c * 2 + i % 2] = m.d[i];
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const Mma& m = *static_cast<const Mma*>(data[l]);
    for (int i = 0; i < 4; ++i) m.d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16) {
  Mma m{d, a, {b0, b1}};
  if (bf16) {
    exchange_data("mma.bf16", ~0u, 0, &m, multiply_add<16, 16, from_bf16>);
  } else {
    exchange_data("mma.f16", ~0u, 0, &m, multiply_add<16, 16, from_f16>);
  }
}

// A shift by 32 bits cannot happen: one value fills a register.
void mma_m16n8k8_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Mma m{d, a, {b0, b1}};
  exchange_data("mma.tf32", ~0u, 0, &m, multiply_add<8, 32, from_tf32>);
}

// ------------------------------------------------------------------------------ cp.async

static void land(const Copy& c) {
  memcpy(c.to, c.from, c.source_bytes);
  memset(c.to + c.source_bytes, 0, c.bytes - c.source_bytes);
}

void cp_async(uintptr_t shared, const void* global, int bytes, int source_bytes) {
  maybe_switch();
  const void* pc = __builtin_return_address(0);
  const Copy c{reinterpret_cast<char*>(shared), static_cast<const char*>(global), bytes,
               source_bytes};
  must_be_shared(c.to, bytes, "cp.async", pc);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fault("cp.async: the global address is no multiple of %d bytes%s", bytes, place(pc).c_str());
  }
  if (source_bytes > 0) check(c.from, source_bytes, false, pc);
  check(c.to, bytes, true, pc);
  set_pending(c.to, bytes, true);
  if (!settings.late_copies) land(c);
  auto& groups = current()->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(c);
}

void cp_async_commit() {
  auto& groups = current()->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void cp_async_wait(int pending) {
  maybe_switch();
  auto& groups = current()->copies;
  const int complete = std::max(0, static_cast<int>(groups.size()) - 1 - pending);
  for (int i = 0; i < complete; ++i) {
    for (const Copy& c : groups[i]) {
      if (settings.late_copies) land(c);
      set_pending(c.to, c.bytes, false);
      check(c.to, c.bytes, true, __builtin_return_address(0));  // written now
    }
  }
  groups.erase(groups.begin(), groups.begin() + complete);
}

void before_atomic(const void* p, size_t bytes) {
  maybe_switch();
  check_atomic(p, bytes);
}

}  // namespace cuda_host
