// Sums over the threads that share a row, in one fixed order: the lanes of each warp as a tree, then its warps, over all
// blocks of the cluster, as another.
#pragma once

#include <cuda_runtime.h>
#include <device/cluster.h>
#include <device/mbarrier.h>
#include <device/shared.h>

namespace megapre::cuda {

template <typename T, typename F>
__device__ __forceinline__ T warp_fold(T x, F fold) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    x = fold(x, __shfl_xor_sync(0xffffffffu, x, bits));
  }
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  return warp_fold(x, [](float a, float b) { return a + b; });
}

__device__ __forceinline__ float warp_max(float x) {
  return warp_fold(x, [](float a, float b) { return fmaxf(a, b); });
}

// The sums of VALUES numbers over the `row_warps` warps of the thread's row, or, when a cluster has one row, over all
// warps of the cluster. All threads of the block must call it. Two buffers take turns: a warp that is one sum ahead
// writes where nobody reads any more, so one barrier a sum is enough.
//
// The warps of a cluster send what they have to each of its blocks, where a barrier counts the bytes. A barrier of the
// cluster instead would be a fence too, at which a thread waits for all that it has stored, and an emptied first cache.
template <int VALUES>
class RowSums {
  static constexpr int kWarps = 32, kClusterWarps = 128;  // 8 blocks of 16 warps

 public:
  struct Storage {
    float warps[2][VALUES][kWarps];           // [buffer][value][warp of the block]
    float cluster[2][VALUES][kClusterWarps];  // [buffer][value][warp of the cluster]
    Mbarrier sent[2];
  };

  // When a cluster has a row, `row_warps` is all warps of a block.
  __device__ __forceinline__ RowSums(Storage& storage, int row_warps)
      : storage_(storage),
        row_warps_(row_warps),
        first_warp_(static_cast<int>(threadIdx.x) / 32 / row_warps * row_warps),
        row_blocks_(static_cast<int>(cluster_blocks())) {
    if (row_blocks_ > 1) {
      if (threadIdx.x == 0) {
        mbarrier_init(&storage_.sent[0], 1);
        mbarrier_init(&storage_.sent[1], 1);
        mbarrier_fence();
      }
      cluster_arrive();
      cluster_wait();
    }
  }

  __device__ __forceinline__ void operator()(float (&x)[VALUES]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int buffer = sums_ & 1;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      x[v] = warp_sum(x[v]);
    }
    if (row_blocks_ > 1) {
      const int all = row_blocks_ * row_warps_, own = static_cast<int>(cluster_rank()) * row_warps_ + warp;
      if (threadIdx.x == 0) {
        mbarrier_expect(&storage_.sent[buffer], all * VALUES * static_cast<int>(sizeof(float)));
      }
      if (lane < row_blocks_) {
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
          send_to_block(x[v], &storage_.cluster[buffer][v][own], &storage_.sent[buffer], static_cast<unsigned>(lane));
        }
      }
      mbarrier_wait(&storage_.sent[buffer], sums_ >> 1 & 1);
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        x[v] = 0.0f;
#pragma unroll 1
        for (int w = lane; w < all; w += 32) {
          x[v] += storage_.cluster[buffer][v][w];
        }
        x[v] = warp_sum(x[v]);
      }
    } else if (row_warps_ > 1) {
      if (lane == 0) {
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
          storage_.warps[buffer][v][warp] = x[v];
        }
      }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        x[v] = warp_sum(lane < row_warps_ ? storage_.warps[buffer][v][first_warp_ + lane] : 0.0f);
      }
    }
    ++sums_;
  }

 private:
  Storage& storage_;
  const int row_warps_, first_warp_, row_blocks_;
  unsigned sums_ = 0;
};

}  // namespace megapre::cuda
