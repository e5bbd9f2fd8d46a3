// What the driver of the embedding's gradient hands to its row loops. Strides are in elements.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct EmbeddingRow {
  c10::ScalarType dtype;        // of dy
  c10::ScalarType total_dtype;  // of total: the accumulation type, or dtype
  int64_t width;
  const void* dy;
  int64_t dy_stride;
  const int64_t* tokens;  // rows of dy, in the order in which they are added
  int64_t count;
  void* sum;    // scratch of `width` accumulators
  void* total;  // one row of the gradient
  bool accumulate;
};

struct EmbeddingKernels {
  // total = sum of the rows of dy, + total where `accumulate`, rounded once.
  void (*add_row)(const EmbeddingRow&);
};

MEGAPRE_DECLARE_LEVELS(EmbeddingKernels, embedding_kernels)

}  // namespace megapre::cpu
