// The dropout mask of an attention weight, as xattn_ops/_dropout.py defines it: Philox4x32-10
// (Salmon et al., SC 2011) of the weight's own coordinates.
#pragma once

#include "launch.cuh"

namespace xattn {

// What a kernel is given. The seed stays on the device: reading it here would wait for the device.
struct Dropout {
  const int64_t* seed;  // null where nothing is dropped
  uint32_t threshold;   // a word below it drops the weight: floor(p 2^32)
  float keep_scale;     // 1 / (1 - p)
};

inline Dropout make_dropout(const void* seed, double p) {
  return {p > 0 ? static_cast<const int64_t*>(seed) : nullptr,
          static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1 / (1 - p))};
}

struct DropoutWords {
  uint32_t word[4];
};

XATTN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

XATTN_DEVICE DropoutWords philox(uint64_t key, DropoutWords counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t (&c)[4] = counter.word;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// The words of four queries that share a counter, 4 * query_block + {0..3}, and one key. unit: the
// attention matrix, numbered through the whole batch; seed: *Dropout::seed.
XATTN_DEVICE DropoutWords dropout_words(uint64_t seed, uint64_t unit, int query_block, int key,
                                        int keys) {
  const uint32_t place = static_cast<uint32_t>(query_block) * keys + key;
  return philox(seed, {{place, static_cast<uint32_t>(unit), static_cast<uint32_t>(unit >> 32), 0}});
}

// What a weight is multiplied by.
XATTN_DEVICE float keep_weight(const Dropout& dropout, uint32_t word) {
  return word >= dropout.threshold ? dropout.keep_scale : 0.0f;
}

// The same of one weight (query, key) where no words are shared.
XATTN_DEVICE float keep_weight(const Dropout& dropout, uint64_t unit, int query, int key,
                               int keys) {
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  const DropoutWords words = dropout_words(seed, unit, query / 4, key, keys);
  const int w = query % 4;  // no index that varies: the words stay in registers
  return keep_weight(dropout, w < 2 ? (w == 0 ? words.word[0] : words.word[1])
                                    : (w == 2 ? words.word[2] : words.word[3]));
}

}  // namespace xattn
