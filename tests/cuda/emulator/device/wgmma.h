// Emulated csrc/cuda/device/wgmma.h. Sums are poison from the start of a product to the wait for it. Each thread computes
// the sums that it holds, decoding descriptors by itself; rows of A in registers are gathered over the warp.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../products.h"
#include "panel.h"
#include "vector.h"

namespace megapre::cuda {

inline void warpgroup_arrive() { emulator::products().arrive(); }
inline void warpgroup_commit() { emulator::products().commit(); }

template <int GROUPS>
void warpgroup_wait() {
  emulator::products().wait(GROUPS);
}

template <int COUNT>
void settle(float (&)[COUNT]) {}
inline void computed(float) {}
inline Panel not_kept(Panel p) { return p; }

template <int COUNT>
void renew(float (&d)[COUNT]) {
  std::memset(d, 0xFF, sizeof d);
}

template <typename T, bool TRANSPOSED, int COUNT>
void wgmma(float (&d)[COUNT], Panel a, Panel b, bool add) {
  static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "N is 64, 128 or 256");
  emulator::products().start({d, COUNT, std::is_same_v<T, bf16>, TRANSPOSED, add, true, a.bits, b.bits, {}});
}

template <typename T, bool TRANSPOSED, int COUNT>
void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], Panel b, bool add) {
  static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "N is 64, 128 or 256");
  emulator::Product product{d, COUNT, std::is_same_v<T, bf16>, TRANSPOSED, add, false, 0, b.bits, {}};
  std::memcpy(product.a, a, sizeof a);
  emulator::products().start(product);
}

}  // namespace megapre::cuda
