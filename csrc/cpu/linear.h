// What the driver of the linear layer hands to its row loops. Strides are in elements.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct LinearKernels {
  // out [m, n] of `dtype` = c [m, n] + bias [n] (null: none), + out where `accumulate`, rounded once.
  void (*finish)(
      c10::ScalarType dtype, int64_t m, int64_t n, const float* c, int64_t ldc, const float* bias, void* out,
      int64_t ldo, bool accumulate);
  // sums [m] (added to where `accumulate`) = sums of the rows of a [m, n].
  void (*row_sums)(
      c10::ScalarType dtype, int64_t m, int64_t n, const void* a, int64_t lda, float* sums, bool accumulate);
};

MEGAPRE_DECLARE_LEVELS(LinearKernels, linear_kernels)

}  // namespace megapre::cpu
