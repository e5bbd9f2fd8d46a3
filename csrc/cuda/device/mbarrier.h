// Barriers in shared memory on which copies of the TMA unit end (sm_90). A phase ends when as many threads have arrived as
// `mbarrier_init` was told and all bytes that they announced have landed; then the next begins. Phases are waited for by
// their parity: 0 for the first, 1 for the second, 0 again. PTX ISA 8.0, "mbarrier".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megapre::cuda {

struct alignas(8) Mbarrier {
  uint64_t bits;
};

// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// By one thread, before mbarrier_fence and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised barriers visible to the TMA unit.
__device__ __forceinline__ void mbarrier_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and lets the phase wait for `bytes` bytes more.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity has ended. A barrier that is new has ended a phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace megapre::cuda
