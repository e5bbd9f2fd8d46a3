// e^x by one multiplication and one instruction of the special function unit: exact for 0, else to about 2^-22 for |x| up
// to 1, and |x| times that beyond.
#pragma once

#include <cuda_runtime.h>
#include <device/exp2.h>

namespace megapre::cuda {

__device__ __forceinline__ float exponential(float x) {
  return fast_exp2(x * 1.44269504f);  // log2(e)
}

}  // namespace megapre::cuda
