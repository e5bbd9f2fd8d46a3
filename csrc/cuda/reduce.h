// Sums over the threads that share a row, in one fixed order: the lanes of each warp as a tree, then the warps one after
// another, then the blocks of the cluster one after another.
#pragma once

#include <cuda_runtime.h>
#include <device/cluster.h>
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

// The sums of VALUES numbers over the `warps` warps of the thread's row, or, when a cluster has one row, over all threads
// of the cluster. All threads of the block must call it. Two buffers take turns: a warp that is one sum ahead writes where
// nobody reads any more, so one barrier a sum is enough.
template <int VALUES>
class RowSums {
  static constexpr int kWarps = 32;
  float (*warps_)[VALUES][kWarps];  // [buffer][value][warp of the block]
  float (*blocks_)[VALUES];         // [buffer][value], read by the other blocks of the cluster
  int buffer_ = 0;

 public:
  template <typename Storage>
  __device__ __forceinline__ explicit RowSums(Storage& storage) : warps_(storage.warps), blocks_(storage.blocks) {}

  struct Storage {
    float warps[2][VALUES][kWarps];
    float blocks[2][VALUES];
  };

  __device__ __forceinline__ void operator()(float (&x)[VALUES], int warps) {
    const int warp = static_cast<int>(threadIdx.x) / 32, first = warp / warps * warps;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      x[v] = warp_sum(x[v]);
    }
    if (warps > 1) {
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
          warps_[buffer_][v][warp] = x[v];
        }
      }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        x[v] = 0.0f;
        for (int w = 0; w < warps; ++w) {
          x[v] += warps_[buffer_][v][first + w];
        }
      }
    }
    if (cluster_blocks() > 1) {
      if (threadIdx.x == 0) {
#pragma unroll
        for (int v = 0; v < VALUES; ++v) {
          blocks_[buffer_][v] = x[v];
        }
      }
      cluster_arrive();
      cluster_wait();
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        x[v] = 0.0f;
        for (unsigned block = 0; block < cluster_blocks(); ++block) {
          x[v] += load_from_block(&blocks_[buffer_][v], block);
        }
      }
    }
    buffer_ ^= 1;
  }

  // Before the kernel ends: the shared memory of a block that has ended cannot be read.
  __device__ __forceinline__ void finish() const {
    if (cluster_blocks() > 1) {
      cluster_arrive();
      cluster_wait();
    }
  }
};

}  // namespace megapre::cuda
