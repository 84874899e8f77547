// Matrix products of one warp, alike for every storage type: C [16, 8] += A [16, 16] B [16, 8].
//
// Lane l holds, with g = l / 4 and c = 2 (l % 4), pairs of neighbours:
//   A: 0 (g, c..c+1)   1 (g+8, c..c+1)   2 (g, c+8..c+9)   3 (g+8, c+8..c+9)
//   B: 0 (c..c+1, g)   1 (c+8..c+9, g)
//   C: 0, 1 (g, c..c+1)   2, 3 (g+8, c..c+1)
// so two neighbouring tiles of C are an A of the next product, without a move between lanes.
//
// Short types take tensor cores as they are. float splits each value into two tf32 and adds three
// products (Markidis et al., 2018): what it leaves out is below 2^-22 of a product.
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"

namespace xattn {

XATTN_DEVICE int lane_id() { return threadIdx.x & 31; }

template <class T>
struct FragmentA {
  uint32_t pairs[4];
};
template <>
struct FragmentA<float> {
  float pairs[4][2];
};
template <class T>
struct FragmentB {
  uint32_t pairs[2];
};
template <>
struct FragmentB<float> {
  float pairs[2][2];
};

// Loads from shared memory. Rows are `stride` elements apart; for short types rows start at
// multiples of 16 bytes (a stride of 8 mod 64 elements keeps ldmatrix free of bank conflicts), for
// float at multiples of 8.

// A[m][k] = s[m * stride + k]
template <class T>
XATTN_DEVICE void load_a(FragmentA<T>& a, const T* s, int stride) {
  const int l = lane_id();
  if constexpr (kIsShort<T>) {
    ptx::ldmatrix<4, false>(a.pairs, s + (l & 15) * stride + (l >> 4) * 8);
  } else {
    const float* from = s + (l >> 2) * stride + (l & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto pair =
          *reinterpret_cast<const Pack<float, 2>*>(from + (i & 1) * 8 * stride + (i >> 1) * 8);
      a.pairs[i][0] = pair.v[0];
      a.pairs[i][1] = pair.v[1];
    }
  }
}

// A[m][k] = s[k * stride + m]
template <class T>
XATTN_DEVICE void load_a_transposed(FragmentA<T>& a, const T* s, int stride) {
  const int l = lane_id();
  if constexpr (kIsShort<T>) {
    ptx::ldmatrix<4, true>(a.pairs, s + ((l & 7) + (l >> 4) * 8) * stride + ((l >> 3) & 1) * 8);
  } else {
    const float* from = s + (l & 3) * 2 * stride + (l >> 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        a.pairs[i][j] = from[((i >> 1) * 8 + j) * stride + (i & 1) * 8];
      }
    }
  }
}

// B[k][n] = s[n * stride + k]: rows of s are columns of B, as keys are in q k^T.
template <class T>
XATTN_DEVICE void load_b(FragmentB<T>& b, const T* s, int stride) {
  const int l = lane_id();
  if constexpr (kIsShort<T>) {
    ptx::ldmatrix<2, false>(b.pairs, s + (l & 7) * stride + ((l >> 3) & 1) * 8);
  } else {
    const float* from = s + (l >> 2) * stride + (l & 3) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto pair = *reinterpret_cast<const Pack<float, 2>*>(from + i * 8);
      b.pairs[i][0] = pair.v[0];
      b.pairs[i][1] = pair.v[1];
    }
  }
}

// B[k][n] = s[k * stride + n]: as values are in p v.
template <class T>
XATTN_DEVICE void load_b_transposed(FragmentB<T>& b, const T* s, int stride) {
  const int l = lane_id();
  if constexpr (kIsShort<T>) {
    ptx::ldmatrix<2, true>(b.pairs, s + (l & 15) * stride);
  } else {
    const float* from = s + (l & 3) * 2 * stride + (l >> 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) b.pairs[i][j] = from[(i * 8 + j) * stride];
    }
  }
}

// Columns n .. n+7 and n+8 .. n+15 at once: half as many instructions for short types.
template <class T>
XATTN_DEVICE void load_b_pair(FragmentB<T> (&b)[2], const T* s, int stride) {
  if constexpr (kIsShort<T>) {
    const int l = lane_id();
    uint32_t r[4];
    ptx::ldmatrix<4, false>(r, s + ((l & 7) + (l >> 4) * 8) * stride + ((l >> 3) & 1) * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
  } else {
    load_b(b[0], s, stride);
    load_b(b[1], s + 8 * stride, stride);
  }
}
template <class T>
XATTN_DEVICE void load_b_pair_transposed(FragmentB<T> (&b)[2], const T* s, int stride) {
  if constexpr (kIsShort<T>) {
    const int l = lane_id();
    uint32_t r[4];
    ptx::ldmatrix<4, true>(r, s + (l & 15) * stride + (l >> 4) * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
  } else {
    load_b_transposed(b[0], s, stride);
    load_b_transposed(b[1], s + 8, stride);
  }
}

// Columns 0 .. 7 and 8 .. 15 of an earlier product as the A of the next, rounded to T.
template <class T>
XATTN_DEVICE FragmentA<T> as_a(const float (&left)[4], const float (&right)[4]) {
  if constexpr (kIsShort<T>) {
    return {{pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]),
             pack_pair<T>(right[0], right[1]), pack_pair<T>(right[2], right[3])}};
  } else {
    return {{{left[0], left[1]}, {left[2], left[3]}, {right[0], right[1]}, {right[2], right[3]}}};
  }
}

// c += a b, of float: columns 8 half .. 8 half + 7 of a. Columns c and c + 1 of a pair take the
// places k and k + 4 of the instruction, in a and b alike: the order of a sum's terms is free.
XATTN_DEVICE void multiply_add_tf32(float (&c)[4], const FragmentA<float>& a,
                                    const FragmentB<float>& b, int half) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = a.pairs[2 * half + (i & 1)][i >> 1];
    a_high[i] = ptx::to_tf32(x);
    a_low[i] = ptx::to_tf32(x - __uint_as_float(a_high[i]));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x = b.pairs[half][i];
    b_high[i] = ptx::to_tf32(x);
    b_low[i] = ptx::to_tf32(x - __uint_as_float(b_high[i]));
  }
  ptx::mma_m16n8k8_tf32(c, a_low, b_high);  // the small ones first
  ptx::mma_m16n8k8_tf32(c, a_high, b_low);
  ptx::mma_m16n8k8_tf32(c, a_high, b_high);
}

template <class T>
XATTN_DEVICE void multiply_add(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (kIsShort<T>) {
    ptx::mma_m16n8k16<kIsBf16<T>>(c, a.pairs, b.pairs);
  } else {
    multiply_add_tf32(c, a, b, 0);
    multiply_add_tf32(c, a, b, 1);
  }
}

// The same with columns 0 .. 7 of a and rows 0 .. 7 of b alone; the rest need not be set.
template <class T>
XATTN_DEVICE void multiply_add_half(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (kIsShort<T>) {
    ptx::mma_m16n8k8<kIsBf16<T>>(c, a.pairs, b.pairs);
  } else {
    multiply_add_tf32(c, a, b, 0);
  }
}

// The same as multiply_add, for float with hardly a rounding error at twice the cost: three parts
// of each value, the six products that reach 2^-24, and one addition to c for all of them. For sums
// of very few terms, which float itself rounds little, and of hundreds.
template <class T>
XATTN_DEVICE void multiply_add_exact(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (kIsShort<T>) {
    multiply_add(c, a, b);
  } else {
    float sums[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[3][4], right[3][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = a.pairs[2 * half + (i & 1)][i >> 1];
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          left[part][i] = ptx::to_tf32(x);
          x -= __uint_as_float(left[part][i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = b.pairs[half][i];
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          right[part][i] = ptx::to_tf32(x);
          x -= __uint_as_float(right[part][i]);
        }
      }
#pragma unroll
      for (int sum = 2; sum >= 0; --sum) {  // the small ones first
#pragma unroll
        for (int part = 0; part <= sum; ++part) {
          ptx::mma_m16n8k8_tf32(sums, left[part], right[sum - part]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sums[i];
  }
}

}  // namespace xattn
