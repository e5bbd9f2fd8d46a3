// What the driver of attention hands to its kernels, and what all of them share: which keys a query sees, and which
// tiles need no mask. Sizes and strides are in elements.
//
// Every mask here (causal, sliding window, documents, and any of them together) lets query i see one interval of keys
// and key j be seen by one interval of queries, and the ends of these intervals never move backwards. So for a tile of
// queries
//     first(last query) .. end(first query)     are keys that all of them see: no mask there;
//     first(first query) .. end(last query)     are keys that any of them sees: tiles outside are never touched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vector.h"

namespace megapre::cuda {

constexpr int kLargestDim = 256;
// Elements from a row to the next: an int holds 32 of them.
constexpr int64_t kLargestStride = int64_t{1} << 25;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A tensor [batch, sequence, heads, dim] whose last dim lies in neighbours; rows start at multiples of 16 bytes.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;

  template <typename T>
  __device__ __forceinline__ T* of(int64_t at_batch, int64_t at_head) const {
    return static_cast<T*>(data) + at_batch * batch + at_head * head;
  }
};

// Query n of a group of `group` heads reads key head n / group where it lies.
struct Attention {
  bool is_bf16;  // or fp16
  int batch, queries, keys, heads, key_heads, group, dim;
  bool causal;
  int window;  // 0: none; at most `keys`
  float scale;
  // Of each token the first key of its document and the one after its last, within its row of the batch, [batch, keys];
  // null without documents.
  const int* first;
  const int* end;
  Heads q, k, v, o;
  float* lse;  // [batch, heads, queries]
  // Of the backward alone.
  Heads d_o, dq, dk, dv;
  // Of each query log2 of its sum of exponentials and its delta, [batch, heads, padded_queries, 2]; for queries past
  // the last inf and 0, by which their probabilities are 0.
  float* statistics;
  int padded_queries;
};

// Queries that statistics are filled up to; every tile of queries divides it.
constexpr int kQueryUnit = 128;

struct alignas(8) Interval {
  int first, end;
  __device__ __forceinline__ bool holds(int i) const { return i >= first && i < end; }
};

// The keys that `query` sees. Queries past the last are taken as the last.
__device__ __forceinline__ Interval keys_of(const Attention& op, int batch, int query) {
  query = min(query, op.queries - 1);
  const int at = query + op.keys - op.queries;
  Interval seen{0, op.causal ? at + 1 : op.keys};
  if (op.window > 0) {
    seen.first = max(at - op.window + 1, 0);
    seen.end = min(at + op.window, seen.end);
  }
  if (op.first != nullptr) {
    const int64_t token = int64_t{batch} * op.keys + query;  // with documents, queries and keys are the same tokens
    seen.first = max(seen.first, op.first[token]);
    seen.end = min(seen.end, op.end[token]);
  }
  return seen;
}

// The queries that see `key`. Keys past the last are taken as the last.
__device__ __forceinline__ Interval queries_of(const Attention& op, int batch, int key) {
  key = min(key, op.keys - 1);
  const int at = key + op.queries - op.keys;
  Interval seen{op.causal ? max(at, 0) : 0, op.queries};
  if (op.window > 0) {
    seen.first = max(at - op.window + 1, seen.first);
    seen.end = min(at + op.window, seen.end);
  }
  if (op.first != nullptr) {
    const int64_t token = int64_t{batch} * op.keys + key;
    seen.first = max(seen.first, op.first[token]);
    seen.end = min(seen.end, op.end[token]);
  }
  return seen;
}

// Of what the first and the last row of a tile see, the tiles of WIDTH: from `begin` to `end`, without a mask where
// whole.
template <int WIDTH>
struct TileRange {
  int begin, end;
  Interval common;

  __device__ __forceinline__ TileRange(Interval of_first, Interval of_last)
      : begin(of_first.first / WIDTH),
        end((max(of_last.end, 0) + WIDTH - 1) / WIDTH),
        common{of_last.first, of_first.end} {}

  __device__ __forceinline__ int count() const { return max(end - begin, 0); }

  // Whether some row of the tile does not see all of tile i.
  __device__ __forceinline__ bool cut(int i) const {
    return i * WIDTH < common.first || (i + 1) * WIDTH > common.end;
  }
};

// Block i of a grid over tiles, heads and rows of the batch. The tiles of a head lie next to each other, for they read
// the same keys; so do the heads of a group.
struct BlockPlace {
  int tile, head, batch;

  __device__ __forceinline__ BlockPlace(int tiles, int heads) {
    const int rest = static_cast<int>(blockIdx.x) / tiles;
    tile = static_cast<int>(blockIdx.x) % tiles;
    head = rest % heads;
    batch = rest / heads;
  }
};

// The kernels for sm_80 and up. The backward is given dlse, the gradient of lse, null for none.
void attention_forward_sm80(const Attention& op, cudaStream_t stream);
void attention_backward_sm80(const Attention& op, const float* dlse, cudaStream_t stream);
// For sm_90a alone (attention_sm90.h).
void attention_forward_sm90(const Attention& op, cudaStream_t stream);
void attention_backward_sm90(const Attention& op, const float* dlse, cudaStream_t stream);
// op.statistics, for both backwards.
void attention_statistics(const Attention& op, const float* dlse, cudaStream_t stream);

}  // namespace megapre::cuda
