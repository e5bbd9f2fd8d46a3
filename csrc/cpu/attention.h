// What the driver of attention hands to its tile loops. Strides and sizes are in elements.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"
#include "products.h"

namespace megapre::cpu {

// Queries and keys of one tile of scores. A row of 64 scores is long enough for the vector units, and the operands of a
// tile's products, its scores and its probabilities stay in the second-level cache at every head dim.
constexpr int64_t kQueryTile = 64;
constexpr int64_t kKeyTile = 64;

// Head dims are filled up by zeros to a multiple of this: whole vectors, and few shapes of tiles.
constexpr int64_t kDimUnit = 16;
constexpr int64_t kLargestDim = 256;

// A tensor [batch, sequence, heads, dim] whose last dim lies in neighbours.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

// Query i of batch row b sees the keys first[b * span_stride + i] up to, and without, end[b * span_stride + i]. Neither
// falls with i, so the keys that some query of a tile sees form one interval, and those that all of them see another.
struct Attention {
  c10::ScalarType dtype;       // of q, k, v, o and their gradients: fp32, bf16 or fp16
  c10::ScalarType tile_dtype;  // of the operands of products: bf16 where the CPU multiplies it, fp32 otherwise
  const Products* products;
  int64_t queries;
  int64_t keys;
  int64_t heads;
  int64_t key_heads;
  int64_t dim;
  int64_t group;  // query heads to a key head
  int64_t query_tiles;
  int64_t padded_dim;
  int64_t sums_size;  // numbers: dk and dv of a key head, [2][whole key tiles][padded_dim]
  double scale;
  const int64_t* first;
  const int64_t* end;
  int64_t span_stride;
  Heads q, k, v, o;
  float* lse;  // [batch, heads, queries]
  // Backward only.
  Heads d_o, dq, dk, dv;
  const float* dlse;  // null: 0
};

// One task: tiles [begin, end) of the group * query_tiles tiles of queries that share key head `key_head` of batch
// row `batch`, all tiles of one query head before those of the next.
struct AttentionUnit {
  int64_t batch;
  int64_t key_head;
  int64_t begin;
  int64_t end;
};

struct AttentionForward {
  // Bytes that `run` needs at `space` for any unit; they begin at a multiple of 64 and need not be cleared.
  int64_t (*space)(const Attention&);
  // o and lse of the unit's queries.
  void (*run)(const Attention&, const AttentionUnit&, char* space);
};

MEGAPRE_DECLARE_LEVELS(AttentionForward, attention_forward)

struct AttentionBackward {
  int64_t (*space)(const Attention&);
  // dq of the unit's queries, and their share in dk / scale and dv: sums_size numbers at `sums`.
  void (*run)(const Attention&, const AttentionUnit&, char* space, float* sums);
  // dk and dv of one key head: the total of `parts` such sums, which follow one another, in their order.
  void (*store)(const Attention&, int64_t batch, int64_t key_head, const float* sums, int64_t parts);
};

MEGAPRE_DECLARE_LEVELS(AttentionBackward, attention_backward)

}  // namespace megapre::cpu
