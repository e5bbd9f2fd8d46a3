// What the softmax of a row needs to know of it, found in one read: its maximum and the sum of exp(x - maximum), by parts
// that are merged (Milakov & Gimelshein 2018, eq. 4). Within a thread, then over lanes, warps and the cluster, each time
// the maximum first and then sums relative to it, in one fixed order.
#pragma once

#include <cuda_runtime.h>
#include <device/cluster.h>
#include <device/shared.h>

#include <cstring>
#include <type_traits>

#include "exponential.h"
#include "reduce.h"
#include "vector.h"

namespace megapre::cuda {

// exp(x - reference) is 0 for x of -inf, also where all are; NaN and +inf make it NaN.
__device__ __forceinline__ float softmax_reference(float top) {
  return top == -INFINITY ? 0.0f : top;
}

// The largest element of V vectors, without NaN. Of 16-bit elements two are compared at once, as they are.
template <typename T, int N, int V>
__device__ __forceinline__ float largest(const Vector<T, N> (&x)[V]) {
  float top = -INFINITY;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
    Pair pairs[V][N / 2];
    memcpy(pairs, x, sizeof(pairs));
    Pair higher = pairs[0][0];
#pragma unroll
    for (int i = 1; i < V * N / 2; ++i) {
      higher = __hmax2(higher, pairs[i / (N / 2)][i % (N / 2)]);
    }
    top = fmaxf(to_float(higher.x), to_float(higher.y));
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float a[N];
      x[v].to(a);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        top = fmaxf(top, a[i]);
      }
    }
  }
  return top;
}

struct SoftmaxStatistics {
  float top = -INFINITY;  // maximum; of NaN nothing is seen here, but the sum is NaN
  float sum = 0.0f;       // of exp(x - softmax_reference(top))
  float plain = 0.0f;     // sum of x, for label smoothing
  float at_label = 0.0f;  // the label's logit, from the thread that has it; 0 from the others

  // Takes in V vectors; from `present` on they hold -inf and do not exist.
  template <typename T, int N, int V>
  __device__ __forceinline__ void add(const Vector<T, N> (&x)[V], int present, bool with_plain) {
    const float higher = fmaxf(top, largest(x)), reference = softmax_reference(higher);
    sum *= exponential(top - reference);
    top = higher;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float a[N], part = 0.0f;
      x[v].to(a);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        part += exponential(a[i] - reference);
      }
      sum += part;
      if (with_plain && v < present) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          plain += a[i];
        }
      }
    }
  }

  __device__ __forceinline__ SoftmaxStatistics over_lanes() const {
    const float all = warp_max(top);
    return {all, warp_sum(sum * exponential(top - softmax_reference(all))), warp_sum(plain), warp_sum(at_label)};
  }
};

// Of the warps of a block, and of a block for the others of its cluster.
struct SoftmaxStorage {
  float4 warps[32];
  float4 block;
};

// The statistics of a row that a whole block has, or a whole cluster: the same in all its threads. Once a kernel; before
// it ends it calls leave_row(), because the shared memory of a block that has ended cannot be read.
__device__ __forceinline__ SoftmaxStatistics over_row(SoftmaxStatistics own, SoftmaxStorage& storage) {
  const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32, blocks = cluster_blocks();
  own = own.over_lanes();
  if (warps > 1) {
    if (lane == 0) {
      storage.warps[threadIdx.x / 32] = make_float4(own.top, own.sum, own.plain, own.at_label);
    }
    __syncthreads();
    own = SoftmaxStatistics{};
    if (lane < warps) {
      const float4 of_warp = storage.warps[lane];
      own = {of_warp.x, of_warp.y, of_warp.z, of_warp.w};
    }
    own = own.over_lanes();
  }
  if (blocks > 1) {
    if (threadIdx.x == 0) {
      storage.block = make_float4(own.top, own.sum, own.plain, own.at_label);
    }
    cluster_arrive();
    cluster_wait();
    own = SoftmaxStatistics{};
    if (lane < blocks) {
      const float4* const there = &storage.block;
      own = {
          load_from_block(&there->x, lane), load_from_block(&there->y, lane), load_from_block(&there->z, lane),
          load_from_block(&there->w, lane)};
    }
    own = own.over_lanes();
    cluster_arrive();
  }
  return own;
}

__device__ __forceinline__ void leave_row() {
  if (cluster_blocks() > 1) {
    cluster_wait();
  }
}

}  // namespace megapre::cuda
