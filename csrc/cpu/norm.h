// What the driver of the norms hands to its row loops: layer_norm, which subtracts the mean, and rms_norm.
// Strides are in elements; `dtype` is that of x, residual, y, h, dy, dh and dx; everything else is of the accumulation
// type. What is written has rows `width` apart.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct NormForward {
  c10::ScalarType dtype;
  bool centred;  // layer_norm
  int64_t width;
  double eps;
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: none
  int64_t residual_stride;
  const void* weight;
  const void* bias;  // null: none
  void* y;
  void* h;     // null without a residual
  void* mean;  // of layer_norm
  void* rstd;
};

struct NormBackward {
  c10::ScalarType dtype;
  bool centred;  // layer_norm
  int64_t width;
  const void* dy;
  int64_t dy_stride;
  const void* dh;  // null: none
  int64_t dh_stride;
  const void* h;
  int64_t h_stride;
  const void* weight;
  bool has_bias;
  const void* mean;  // of layer_norm
  const void* rstd;
  void* dx;
};

struct NormKernels {
  void (*forward)(const NormForward&, int64_t begin, int64_t end);
  // Leaves the sums over rows [begin, end) of dweight, and of dbias where there is a bias, in `sums` (column_sums.h).
  void (*backward)(const NormBackward&, int64_t begin, int64_t end, void* sums);
};

MEGAPRE_DECLARE_LEVELS(NormKernels, norm_kernels)

}  // namespace megapre::cpu
