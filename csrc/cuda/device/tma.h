// Copies of boxes of a tensor between global and shared memory by the TMA unit (sm_90): one thread starts a copy, the
// hardware computes addresses. What of a box lies outside of the tensor is read as zero and not written. Shared memory
// holds rows of 128 bytes (kSwizzledRow), swizzled: bits 4 to 6 of an address are xored with bits 7 to 9, so that neither
// rows nor columns of 16-byte pieces meet in a bank. PTX ISA 8.0, "cp.async.bulk.tensor"; CUDA driver API, "Tensor map".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include <device/mbarrier.h>

namespace megapre::cuda {

using TensorMap = CUtensorMap;  // for a kernel: a parameter `const __grid_constant__ TensorMap`

inline constexpr int kSwizzledRow = 128;

// The tensor at `data`, 16 bits an element, neighbours along dim 0; dims 1 to 3 are strides[] bytes apart. A box has 64
// elements along dim 0, so rows of 128 bytes, and `box_rows` of them along dim 1. `data` and strides are multiples of 16.
inline TensorMap tensor_map_16bit(
    bool is_bf16, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows) {
  using Encode = CUresult (*)(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const auto encode = [] {  // a function of the driver, which is not linked
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("cuTensorMapEncodeTiled: this driver has none; CUDA 12.0 or later is needed");
    }
    return reinterpret_cast<Encode>(found);
  }();
  cuuint64_t size[4], stride[3];
  for (int dim = 0; dim < 4; ++dim) {
    size[dim] = static_cast<cuuint64_t>(sizes[dim]);
  }
  for (int dim = 0; dim < 3; ++dim) {
    stride[dim] = static_cast<cuuint64_t>(strides[dim]);
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(data),
      size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// The box whose first element is (c0, c1, c2, c3) to `to`, a multiple of 1024 bytes; its bytes count on `barrier`.
__device__ __forceinline__ void tma_load(
    void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, int c3) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

// `bytes` neighbours, a multiple of 16 as are both addresses.
__device__ __forceinline__ void tma_load_row(void* to, const void* from, int bytes, Mbarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// The box at (c0, c1, c2, c3) from shared memory. Before it: async_fence by who wrote `from`, and a barrier.
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* from, int c0, int c1, int c2, int c3) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

// Until what this thread has stored is read from shared memory, which may then be written again or be given up.
__device__ __forceinline__ void tma_store_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// Lets TMA and wgmma see what this thread has written to shared memory.
__device__ __forceinline__ void async_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace megapre::cuda
