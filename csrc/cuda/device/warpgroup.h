// What warpgroups, four warps each, share a multiprocessor by (sm_90a): registers that move between them, and barriers
// of some of the block's warps. PTX ISA 8.0, "setmaxnreg", "barrier".
#pragma once

#include <cuda_runtime.h>

namespace megapre::cuda {

// The number of registers of each thread of this warpgroup from here on, a multiple of 8: fewer than the kernel started
// with, or more, once others have given up as many. By all threads of the warpgroup.
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// Barrier `id`, 1 to 15, of `threads` threads in whole warps: those that wait and those that only arrive.
__device__ __forceinline__ void barrier_wait(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace megapre::cuda
