// What the driver of grad_norm hands to its loop.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

// Elements that are summed by themselves, wherever they lie in a tensor and whatever thread takes them.
constexpr int64_t kNormBlock = 4096;

struct GradNormKernels {
  // Sum of squares of each block in [begin, end) of the `count` neighbours at `grad`, to sums[block].
  void (*squares)(c10::ScalarType dtype, const void* grad, int64_t count, int64_t begin, int64_t end, double* sums);
};

MEGAPRE_DECLARE_LEVELS(GradNormKernels, grad_norm_kernels)

}  // namespace megapre::cpu
