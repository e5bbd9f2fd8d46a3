// What the driver of rope hands to its row loops. Strides are in elements; elements of a head are neighbours. `dtype` is
// that of the heads; the tables are of the accumulation type.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

// Some heads of every token, rotated or only moved from `in` to `out`, which may be the same memory.
struct RopePart {
  const void* in;
  int64_t in_batch;
  int64_t in_token;
  int64_t in_head;
  void* out;
  int64_t out_batch;
  int64_t out_token;
  int64_t out_head;
  int64_t heads;
  bool rotate;
};

constexpr int kRopeParts = 3;  // queries, keys, values

struct RopeRows {
  c10::ScalarType dtype;
  int64_t sequence;          // tokens in a row of the batch
  int64_t half;              // pairs in a head
  const int64_t* positions;  // of each token; null: its place in its row of the batch
  const void* cos;           // [positions, half]
  const void* sin;
  bool interleaved;  // pairs (2i, 2i + 1), not (i, i + half)
  bool inverse;      // by the other angle
  RopePart parts[kRopeParts];
  int count;
};

struct RopeKernels {
  // Tokens [begin, end) of the flattened batch.
  void (*rotate)(const RopeRows&, int64_t begin, int64_t end);
};

MEGAPRE_DECLARE_LEVELS(RopeKernels, rope_kernels)

}  // namespace megapre::cpu
