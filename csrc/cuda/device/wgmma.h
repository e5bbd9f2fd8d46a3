// Products of a warpgroup on the tensor cores (sm_90a): D [64, N] += A [64, 16] B [16, N] in fp32, of bf16 or fp16. B comes
// from shared memory, A from there or from registers; the product runs on while the threads do other things.
// PTX ISA 8.0, "wgmma".
//
// Registers (thread t of the warpgroup, g = t % 32 / 4, c = t % 4 * 2):
//   D   d[4 j + 2 h + e] is row 16 (t / 32) + g + 8 h, column 8 j + c + e
//   A   half e of a[2 l + h] is row 16 (t / 32) + g + 8 h, column 8 l + c + e
// so that D of one product, rounded, is A of the next: its columns 16 i to 16 i + 15 are d[8 i] to d[8 i + 7].
//
// Shared memory holds panels (panel.h). Elements along a row are the summed ones, or else the rows are (B TRANSPOSED).
//
//   warpgroup_arrive(); wgmma(...); wgmma(...); warpgroup_commit(); ... warpgroup_wait<0>(); settle(d);
// Between a product and the wait neither its registers nor what it reads may be touched. Where products run on over the end
// of a loop, ptxas knows what is finished only after a wait for all of them; a wait for some it believes when they were
// started since. Else it lets all products wait for each other, and says so (C7510 to C7519).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "panel.h"
#include "vector.h"
#include "wgmma_forms.h"

namespace megapre::cuda {

// Before the first product, and before the first after other instructions wrote registers that products use.
__device__ __forceinline__ void warpgroup_arrive() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// All products since the last commit are one group.
__device__ __forceinline__ void warpgroup_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most GROUPS groups are not finished.
template <int GROUPS>
__device__ __forceinline__ void warpgroup_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Keeps the compiler from moving uses of sums to before this place: for sums that were waited for, or will be added to.
template <int COUNT>
__device__ __forceinline__ void settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

// Forgets what sums hold, before a product that does not add to them: else ptxas takes the last writes of other instructions
// for the start of these sums, and lets all products under way end first.
template <int COUNT>
__device__ __forceinline__ void renew(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    asm volatile("" : "=f"(d[i]));
  }
}

// The same panel, which the compiler takes for another: what is added to it is not computed ahead of a loop and kept.
__device__ __forceinline__ Panel not_kept(Panel p) {
  asm volatile("" : "+l"(p.bits));
  return p;
}

// Keeps a wait for products behind the computation of x, which is never negative: ptxas moves waits up and what should run
// beside the products down, but not across a barrier of the warp whose mask it does not know.
__device__ __forceinline__ void computed(float x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred never;\n.reg .b32 lanes;\nsetp.lt.f32 never, %0, 0f00000000;\nselp.b32 lanes, 0, -1, never;\n"
      "bar.warp.sync lanes;\n}\n" ::"f"(x)
      : "memory");
#endif
}

// d = A B + (add ? d : 0), N = 2 COUNT.
template <typename T, bool TRANSPOSED, int COUNT>
__device__ __forceinline__ void wgmma(float (&d)[COUNT], Panel a, Panel b, bool add) {
  static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "N is 64, 128 or 256");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (COUNT == 32 && kBf16) {
    MEGAPRE_WGMMA_SS(64, "bf16", 32, 33, 34, 35);
  } else if constexpr (COUNT == 32) {
    MEGAPRE_WGMMA_SS(64, "f16", 32, 33, 34, 35);
  } else if constexpr (COUNT == 64 && kBf16) {
    MEGAPRE_WGMMA_SS(128, "bf16", 64, 65, 66, 67);
  } else if constexpr (COUNT == 64) {
    MEGAPRE_WGMMA_SS(128, "f16", 64, 65, 66, 67);
  } else if constexpr (kBf16) {
    MEGAPRE_WGMMA_SS(256, "bf16", 128, 129, 130, 131);
  } else {
    MEGAPRE_WGMMA_SS(256, "f16", 128, 129, 130, 131);
  }
#endif
}

// The same with A in registers.
template <typename T, bool TRANSPOSED, int COUNT>
__device__ __forceinline__ void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], Panel b, bool add) {
  static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "N is 64, 128 or 256");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (COUNT == 32 && kBf16) {
    MEGAPRE_WGMMA_RS(64, "bf16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (COUNT == 32) {
    MEGAPRE_WGMMA_RS(64, "f16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (COUNT == 64 && kBf16) {
    MEGAPRE_WGMMA_RS(128, "bf16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (COUNT == 64) {
    MEGAPRE_WGMMA_RS(128, "f16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (kBf16) {
    MEGAPRE_WGMMA_RS(256, "bf16", 128, 129, 130, 131, 132, 133, 134);
  } else {
    MEGAPRE_WGMMA_RS(256, "f16", 128, 129, 130, 131, 132, 133, 134);
  }
#endif
}

}  // namespace megapre::cuda
