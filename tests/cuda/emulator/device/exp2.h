// Emulated csrc/cuda/device/exp2.h; the real one is less exact.
#pragma once

#include <cuda_runtime.h>

namespace megapre::cuda {

inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace megapre::cuda
