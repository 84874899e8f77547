// The dropout mask of an attention weight: Philox4x32-10 (Salmon et al., SC 2011) of the weight's
// own coordinates, so that forward, backward and every backend see the same mask.
#pragma once

#include "simd.h"

namespace xattn::XATTN_ISA {

struct Dropout {
  uint32_t key[2];     // the seed
  uint32_t threshold;  // a word below it drops the weight: floor(p * 2^32)
  double keep_scale;   // 1 / (1 - p)
};

// 32 x 32 -> 64 bit products of all lanes with one constant.
XATTN_INLINE void multiply_wide(vu32 x, uint32_t m, vu32& high, vu32& low) {
  using vu64 = vec<uint64_t>;
  const vu64 even = ((vu64)x & 0xffffffffu) * (uint64_t)m;
  const vu64 odd = ((vu64)x >> 32) * (uint64_t)m;
  low = (vu32)((even & 0xffffffffu) | (odd << 32));
  high = (vu32)((even >> 32) | (odd & 0xffffffff00000000u));
}

XATTN_INLINE void philox(const uint32_t (&key)[2], vu32 (&c)[4]) {
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    vu32 high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Weights of the four queries 4 * query_block + {0..3} against one vector of keys, or for one key
// and a vector of units: 1 / (1 - p) where kept, 0 where dropped.
template <class T>
XATTN_INLINE void keep_weights(const Dropout& d, vu32 query_block_times_keys_plus_key,
                               vu32 unit_low, vu32 unit_high, T* out, int64_t out_row) {
  vu32 words[4] = {query_block_times_keys_plus_key, unit_low, unit_high, vu32{}};
  philox(d.key, words);
  const T kept = (T)d.keep_scale;
  XATTN_UNROLL
  for (int w = 0; w < 4; ++w) {
    for (int l = 0; l < Lanes<float>::n; ++l) {
      out[w * out_row + l] = words[w][l] >= d.threshold ? kept : T(0);
    }
  }
}

}  // namespace xattn::XATTN_ISA
