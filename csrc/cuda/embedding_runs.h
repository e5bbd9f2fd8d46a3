// Sums of the rows of dy by equal keys, which are sorted: a run of equal keys is one row of the gradient.
//
// The sorted tokens are cut into pieces of 32, one a warp, whatever the keys are: a token that is half of the batch costs
// as much as tokens that are all different. A run within one piece is added to its row at once. What a piece has of a run
// that crosses its border becomes one of at most two rows of a shorter list of the same kind, first and last of the piece,
// which the next launch sums: 16 times shorter, until one piece is all. So each sum has one fixed order.
//
// Bytes    dy is read once, each row that occurs read and written once; a sixteenth of that for what crosses borders.
// Floor    bytes / copy rate.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vector.h"

namespace megapre::cuda {

inline constexpr int kPiece = 32;         // tokens: lane i knows of the i-th
inline constexpr int kPanelVectors = 32;  // a warp has a vector a lane of each token
inline constexpr int kRunWarps = 4;       // of a block; they share nothing

// Keys are rows of `total`; `rows` itself is the key of what belongs to none, and comes last. Strides are in elements.
template <typename T, typename S>
struct Runs {
  const int* keys;       // [count], sorted
  const int64_t* order;  // [count], the row of dy that each key is of; -1: there is nothing to add
  int64_t count;
  int rows, width;
  const T* dy;
  int64_t dy_stride;
  S* total;
  int64_t total_stride;
  bool accumulate;
  int* next_keys;  // [2 pieces], with next_order and next_dy the list of what crosses borders; null for one piece
  int64_t* next_order;
  float* next_dy;  // [2 pieces, width]
};

// The keys of ids: their rows of a shard that begins at row `first` of the vocabulary.
__global__ void __launch_bounds__(256)
    embedding_keys_kernel(const int64_t* ids, int64_t tokens, int64_t first, int rows, int* keys) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; t < tokens; t += step) {
    const int64_t id = ids[t];
    keys[t] = id >= first && id - first < rows ? static_cast<int>(id - first) : rows;
  }
}

// What a lane knows of the keys of its warp's piece.
struct Piece {
  unsigned present;  // by token: whether there is a row to add
  unsigned ends;     // by token: whether it is the last of its run here
  int first_key, last_key;
  bool from_before, goes_on;  // the first run began earlier; the last one has not ended

  template <typename Op>
  __device__ __forceinline__ Piece(const Op& op, int64_t first, int lane, int key, int64_t source) {
    const int next = __shfl_down_sync(0xffffffffu, key, 1);
    present = __ballot_sync(0xffffffffu, source >= 0);
    ends = __ballot_sync(0xffffffffu, lane == kPiece - 1 || key != next);
    first_key = __shfl_sync(0xffffffffu, key, 0);
    last_key = __shfl_sync(0xffffffffu, key, kPiece - 1);
    from_before = first > 0 && op.keys[first - 1] == first_key;
    goes_on = first + kPiece < op.count && op.keys[first + kPiece] == last_key;
  }

  // Where the run goes that ends at token i: row 0 or 1 of the piece in the next list; -1: to its row of the gradient.
  __device__ __forceinline__ int slot(int i) const {
    const bool is_first = (ends & ((1u << i) - 1)) == 0, is_last = i == kPiece - 1;
    return is_first && from_before ? 0 : is_last && goes_on ? 1 : -1;
  }

  // Whether a run goes to row `which` of the piece in the next list.
  __device__ __forceinline__ bool sends(int which) const {
    return which == 0 ? from_before : goes_on && !(from_before && first_key == last_key);
  }
};

// N neighbours of fp32 sums, added to what was there or not, as S.
template <typename S, int N>
__device__ __forceinline__ void store_sum(const float (&sum)[N], const Vector<S, N>& old, bool add, S* out) {
  float all[N];
  old.to(all);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    all[i] = add ? all[i] + sum[i] : sum[i];
  }
  Vector<S, N>::from(all).store(out);
}

// One warp has a piece and 32 N columns. Of eight tokens all that is needed is read before the first is added.
template <typename T, typename S, int N>
__global__ void __launch_bounds__(32 * kRunWarps) embedding_runs_kernel(Runs<T, S> op, int panels) {
  constexpr int kBatch = 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t unit = int64_t{blockIdx.x} * kRunWarps + threadIdx.x / 32;
  const int64_t number = unit / panels, first = number * kPiece;
  if (first >= op.count) {
    return;
  }
  const int panel = static_cast<int>(unit % panels), column = (panel * kPanelVectors + lane) * N;
  const bool exists = first + lane < op.count, inside = column < op.width;
  const int key = exists ? op.keys[first + lane] : op.rows;
  const int64_t source = key < op.rows ? op.order[first + lane] : -1;
  const Piece piece(op, first, lane, key, source);
  if (panel == 0 && lane < 2 && op.next_keys != nullptr) {
    const int64_t at = 2 * number + lane;
    op.next_keys[at] = lane == 0 ? piece.first_key : piece.last_key;
    op.next_order[at] = piece.sends(lane) ? at : -1;
  }
  float sum[N] = {};
  bool any = false;  // the run has a row here
#pragma unroll 1
  for (int from = 0; from < kPiece; from += kBatch) {
    if (!any && piece.present >> from == 0) {
      break;  // there is nothing more to add
    }
    Vector<T, N> x[kBatch];
    Vector<S, N> old[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t row = __shfl_sync(0xffffffffu, source, from + i);
      const int to = __shfl_sync(0xffffffffu, key, from + i);
      const bool ends = (piece.ends >> (from + i) & 1) != 0 && to < op.rows && piece.slot(from + i) < 0;
      x[i] = row >= 0 && inside ? Vector<T, N>::load(op.dy + row * op.dy_stride + column) : Vector<T, N>::zeros();
      old[i] = ends && inside && op.accumulate ? Vector<S, N>::load(op.total + to * op.total_stride + column)
                                               : Vector<S, N>::zeros();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = from + i, to = __shfl_sync(0xffffffffu, key, token);
      float a[N];
      x[i].to(a);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum[j] += a[j];
      }
      any = any || (piece.present >> token & 1) != 0;
      if ((piece.ends >> token & 1) != 0) {
        if (any && inside) {
          if (const int slot = piece.slot(token); slot >= 0) {
            Vector<float, N>::from(sum).store(op.next_dy + (2 * number + slot) * op.width + column);
          } else {
            store_sum(sum, old[i], op.accumulate, op.total + to * op.total_stride + column);
          }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
          sum[j] = 0.0f;
        }
        any = false;
      }
    }
  }
}

}  // namespace megapre::cuda
