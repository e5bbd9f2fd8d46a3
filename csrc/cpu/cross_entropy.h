// What the driver of cross_entropy hands to its row loops. Strides are in elements; `dtype` is that of the logits and
// their gradient; losses, lse and dlosses are of the accumulation type.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct CrossEntropyRows {
  c10::ScalarType dtype;
  int64_t vocab;    // columns of a whole row that exist; label smoothing spreads over them
  int64_t first;    // which of them column 0 is: 0, but for a shard of the columns
  int64_t columns;  // columns that exist here: vocab, but for a shard
  int64_t width;    // columns here with the padding; the padding's gradient is 0
  const void* logits;
  int64_t stride;
  const int64_t* labels;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  void* losses;
  void* lse;
  void* stats;  // of a shard, [rows, 3], or 4 with label smoothing
  const void* dlosses;  // null: 1 for every row
  void* gradient;
  int64_t gradient_stride;
};

struct CrossEntropyKernels {
  // losses and lse from logits and labels.
  void (*forward)(const CrossEntropyRows&, int64_t begin, int64_t end);
  // stats from logits and labels: maximum, sum of exponentials relative to it, the label's logit, sum of logits.
  void (*local)(const CrossEntropyRows&, int64_t begin, int64_t end);
  // gradient from logits, labels, lse and dlosses; may overwrite the logits.
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
