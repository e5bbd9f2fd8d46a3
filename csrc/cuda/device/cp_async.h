// Copies from global to shared memory that go on beside the computation (sm_80 and up). A thread's copies form groups;
// its wait is for its own groups, so a barrier must follow before others read. PTX ISA, "cp.async".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megapre::cuda {

// 16 bytes, both addresses multiples of 16, past the first level of cache; zeros where not `exists`, and nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most PENDING of the newest groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace megapre::cuda
