// Random bits from a counter: Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel Random Numbers: As Easy as
// 1, 2, 3"). No state: the bits of an element follow from seed, step, stream and the element's number, on any thread.
//
// Elements are numbered in groups of 128. With l = e % 128, element number e has 16 bits of
//
//   word = philox(counter = {16 (e / 128) + l / 4 % 16 (64 bits), step (32), stream (32)}, key = seed (64))
//
// namely those of word[2 (l / 64) + l % 4 / 2], its lower half if l is even and else its upper. So sixteen counters turn
// together, every bit made is used, and the words lie in memory as they come. kernels/philox.py is the same in torch.
// Only for files compiled once per CPU level.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace megapre::cpu::CPU_CAPABILITY {

static_assert(std::endian::native == std::endian::little, "the lower half of a word must come first in memory");

constexpr int64_t kPhiloxGroup = 128;

// One word a 64-bit lane: products of two 32-bit numbers are what the CPU multiplies fastest. The upper halves of the
// lanes hold rubbish between rounds, which the product ignores.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kPhiloxBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kPhiloxBytes = 32;
#else
constexpr int kPhiloxBytes = 16;
#endif
using PhiloxWords = uint64_t __attribute__((vector_size(kPhiloxBytes)));

inline PhiloxWords philox_product(PhiloxWords a, PhiloxWords b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (PhiloxWords)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (PhiloxWords)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (PhiloxWords)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// The 16 bits of each element of group number `group`, in their order.
inline void philox_group(uint64_t seed, uint64_t group, uint32_t step, uint32_t stream, uint16_t* bits) {
  constexpr int kLanes64 = kPhiloxBytes / 8;
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  const PhiloxWords zero{};
  for (int first = 0; first < 16; first += kLanes64) {
    PhiloxWords x0;
    for (int lane = 0; lane < kLanes64; ++lane) {
      x0[lane] = 16 * group + first + lane;
    }
    PhiloxWords x1 = x0 >> 32, x2 = zero + step, x3 = zero + stream;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const PhiloxWords a = philox_product(x0, zero + kMultiplier0), b = philox_product(x2, zero + kMultiplier1);
      x0 = b >> 32 ^ x1 ^ key0;
      x2 = a >> 32 ^ x3 ^ key1;
      x1 = b;
      x3 = a;
      key0 += kWeyl0;
      key1 += kWeyl1;
    }
    const PhiloxWords pairs[2] = {(x0 & 0xFFFFFFFF) | x1 << 32, (x2 & 0xFFFFFFFF) | x3 << 32};
    std::memcpy(bits + 4 * first, &pairs[0], sizeof(PhiloxWords));
    std::memcpy(bits + 64 + 4 * first, &pairs[1], sizeof(PhiloxWords));
  }
}

}  // namespace megapre::cpu::CPU_CAPABILITY
