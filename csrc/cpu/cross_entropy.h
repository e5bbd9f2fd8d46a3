// What the driver of cross_entropy hands to its row loops. Strides are in elements; `dtype` is that of the logits and
// their gradient; losses, lse and dlosses are of the accumulation type.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct CrossEntropyRows {
  c10::ScalarType dtype;
  int64_t vocab;  // columns that exist
  int64_t width;  // columns with the padding; the padding's gradient is 0
  const void* logits;
  int64_t stride;
  const int64_t* labels;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  void* losses;
  void* lse;
  const void* dlosses;  // null: 1 for every row
  void* gradient;
  int64_t gradient_stride;
};

struct CrossEntropyKernels {
  // losses and lse from logits and labels.
  void (*forward)(const CrossEntropyRows&, int64_t begin, int64_t end);
  // gradient from logits, labels, lse and dlosses.
  void (*backward)(const CrossEntropyRows&, int64_t begin, int64_t end);
  // losses and gradient at once; the gradient may overwrite the logits. `scratch` holds scratch_size(vocab) accumulators.
  void (*both)(const CrossEntropyRows&, int64_t begin, int64_t end, void* scratch);
};

// Columns that are read twice in a row, once for their maximum and once for their exponentials: small enough to stay in
// the first-level cache, long enough that the bookkeeping per block does not show.
constexpr int64_t kColumnBlock = 4096;

// Exponentials of a row, then one reference value per block.
constexpr int64_t scratch_size(int64_t vocab) {
  return vocab + (vocab + kColumnBlock - 1) / kColumnBlock;
}

MEGAPRE_DECLARE_LEVELS(CrossEntropyKernels, cross_entropy_kernels)

}  // namespace megapre::cpu
