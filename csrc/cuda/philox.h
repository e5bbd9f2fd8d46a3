// Random bits from a counter: Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel Random Numbers: As Easy as
// 1, 2, 3"), and rounding with them. The bits are those of kernels/philox.py and csrc/cpu/philox.h.
//
// Elements are numbered in groups of 128. Counter 16 (e / 128) + j, j < 16, makes the 16 bits of eight elements: of
// elements 4 j .. 4 j + 3 of the group from its first two words, of those 64 further on from its last two.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vector.h"

namespace megapre::cuda {

constexpr int kPhiloxGroup = 128;
constexpr int kPhiloxCounters = 16;  // of a group

__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter, uint32_t step, uint32_t stream) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32), x2 = step, x3 = stream;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{x0} * 0xD2511F53u, b = uint64_t{x2} * 0xCD9E8D57u;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
    x1 = static_cast<uint32_t>(b);
    x3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(x0, x1, x2, x3);
}

// x plus a random number of 16 bits below its last place in bf16, then cut: up with the probability of the part cut off.
__device__ __forceinline__ uint32_t round_stochastic(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  const uint32_t quiet = (bits & 0x007FFFFFu) != 0 ? 0x40u : 0u;  // a NaN stays one when its low half is cut off
  return finite ? (bits + random) >> 16 : bits >> 16 | quiet;
}

// Four neighbours, by the 16-bit halves of two words, the lower first.
__device__ __forceinline__ Vector<bf16, 4> round_stochastic(const float (&x)[4], uint32_t low, uint32_t high) {
  Vector<bf16, 4> v;
  v.bits.x = round_stochastic(x[0], low & 0xFFFFu) | round_stochastic(x[1], low >> 16) << 16;
  v.bits.y = round_stochastic(x[2], high & 0xFFFFu) | round_stochastic(x[3], high >> 16) << 16;
  return v;
}

}  // namespace megapre::cuda
