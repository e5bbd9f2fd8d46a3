// Emulated csrc/cuda/device/mma.h. Sums are of exact products, rounded to fp32 once; a tensor core rounds in its own way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace megapre::cuda {

template <bool TRANSPOSED = false>
void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) {
    emulator::fail("load_matrices from an address that is not a multiple of 16");
  }
  const unsigned char* rows = emulator::meet(0xffffffffu, shared_row, 16);
  const unsigned row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned at_row = TRANSPOSED ? column + i : row, at_column = TRANSPOSED ? row : column + i;
      std::memcpy(&pair[i], rows + 16 * (8 * m + at_row) + 2 * at_column, 2);
    }
    std::memcpy(&r[m], pair, 4);
  }
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto value = [](const unsigned char* at) {
    T element;
    std::memcpy(&element, at, 2);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return static_cast<double>(__bfloat162float(element));
    } else {
      return static_cast<double>(__half2float(element));
    }
  };
  unsigned char all_a[32 * 16];
  std::memcpy(all_a, emulator::meet(0xffffffffu, a, 16), sizeof all_a);
  const unsigned char* all_b = emulator::meet(0xffffffffu, b, 8);
  const unsigned g = emulator::lane() / 4, c = emulator::lane() % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g, n = c + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned a_lane = row * 4 + k % 8 / 2, a_register = i / 2 + 2 * (k / 8);
      const unsigned b_lane = n * 4 + k % 8 / 2, b_register = k / 8;
      sum += value(all_a + 16 * a_lane + 4 * a_register + 2 * (k % 2)) *
          value(all_b + 16 * b_lane + 4 * b_register + 2 * (k % 2));
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace megapre::cuda
