// Thread-block clusters (sm_90): the blocks of one run together and read each other's shared memory. Elsewhere a cluster
// has one block. PTX ISA 8.0, "barrier.cluster", "mapa", "ld.shared::cluster".
#pragma once

#include <cuda_runtime.h>
#include <device/mbarrier.h>

#include <cstdint>

namespace megapre::cuda {

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return blocks;
}

// What was written before the arrival is seen after the wait, by every block.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Leaves `value` at the place of `shared` in the shared memory of block `rank`, and counts its 4 bytes at the place of
// `barrier` there: who has waited for that barrier sees it. PTX ISA 8.1, "st.async".
__device__ __forceinline__ void send_to_block(float value, float* shared, Mbarrier* barrier, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %1, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %2, [counter];\n"
      "}\n" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(__float_as_uint(value)), "r"(rank)
      : "memory");
#endif
}

// What lies at the place of `shared` in the shared memory of block `rank`; 4 bytes.
template <typename T>
__device__ __forceinline__ T load_from_block(const T* shared, unsigned rank) {
  static_assert(sizeof(T) == 4);
#if __CUDA_ARCH__ >= 900
  uint32_t there, bits;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(there) : "memory");
  return reinterpret_cast<const T&>(bits);
#else
  return *shared;
#endif
}

}  // namespace megapre::cuda
