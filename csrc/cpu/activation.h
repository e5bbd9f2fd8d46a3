// What the driver of gelu, swiglu and geglu hands to their row loops. Strides are in elements; `dtype` is that of x, dy
// and out; bias and its gradient are of the accumulation type. Rows of `out` lie without gaps.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

enum class Activation { SILU, GELU_TANH, GELU_ERF };

// Gated: x and dx have rows [gate, up] of 2 * width elements, y and dy of `width`. Else all have `width`.
struct ActivationRows {
  c10::ScalarType dtype;
  Activation activation;
  bool gated;
  int64_t width;
  const void* x;
  int64_t x_stride;
  const void* bias;  // added to x; null: none, as in every gated form
  const void* dy;    // null in the forward
  int64_t dy_stride;
  void* out;  // y or dx
};

struct ActivationKernels {
  void (*forward)(const ActivationRows&, int64_t begin, int64_t end);
  // With a bias, leaves the sum over rows [begin, end) of dx in `sums` (column_sums.h).
  void (*backward)(const ActivationRows&, int64_t begin, int64_t end, void* sums);
};

MEGAPRE_DECLARE_LEVELS(ActivationKernels, activation_kernels)

}  // namespace megapre::cpu
