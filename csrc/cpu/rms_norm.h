// What the driver of rms_norm hands to its row loops. Strides are in elements; `dtype` is that of x, y, h, dy, dh and dx;
// weight, rstd and dweight are of the accumulation type.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct RmsNormForward {
  c10::ScalarType dtype;
  int64_t width;
  double eps;
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: none
  int64_t residual_stride;
  const void* weight;
  void* y;
  void* h;  // null without a residual
  void* rstd;
};

struct RmsNormBackward {
  c10::ScalarType dtype;
  int64_t width;
  const void* dy;
  int64_t dy_stride;
  const void* dh;  // null: none
  int64_t dh_stride;
  const void* h;
  int64_t h_stride;
  const void* weight;
  const void* rstd;
  void* dx;
};

struct RmsNormKernels {
  void (*forward)(const RmsNormForward&, int64_t begin, int64_t end);
  // Writes the sum of dweight over rows [begin, end) to `dweight`; `block` is scratch. Both hold `width` accumulators.
  void (*backward)(const RmsNormBackward&, int64_t begin, int64_t end, void* dweight, void* block);
};

MEGAPRE_DECLARE_LEVELS(RmsNormKernels, rms_norm_kernels)

}  // namespace megapre::cpu
