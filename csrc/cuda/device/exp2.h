// Powers of two by the special function unit: one instruction, 2 ulps, denormal results are 0. PTX ISA, "ex2.approx.ftz".
#pragma once

#include <cuda_runtime.h>

namespace megapre::cuda {

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace megapre::cuda
