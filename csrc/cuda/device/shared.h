// Shared memory. MEGAPRE_SHARED(float, partials, [2][32]) declares a static array; dynamic_shared() is what the launch
// asked for.
#pragma once

#include <cuda_runtime.h>

#define MEGAPRE_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

namespace megapre::cuda {

template <typename T = unsigned char>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char megapre_dynamic_shared[];
  return reinterpret_cast<T*>(megapre_dynamic_shared);
}

}  // namespace megapre::cuda
