// Sum of the squares of flat tensors, one read, the same bits every time: each chunk of 32,768 elements is one partial sum
// in fp64, whatever the machine, and one block adds the partial sums up in one fixed order.
//
// A thread sums its 128 elements of a chunk in fp32. Squares leave the range of fp32 long before the gradients do, above
// 1e19 and below 1e-23: a thread whose sum says so reads its elements again, out of the caches, and sums them in fp64. So
// the norm is not finite only where a gradient is not, or where it is itself beyond fp32.
#pragma once

#include <device/shared.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "flat.h"
#include "launch.h"
#include "reduce.h"

namespace megapre::cuda {

enum class GradKind : uint8_t { kFloat, kBFloat16, kHalf };

constexpr int kGradTensors = 128;  // of a launch: their table is an argument, of which there may be 4 KiB
constexpr int kGradChunk = 32768;
constexpr int kGradThreads = 256;

struct GradTable {
  int tensors;
  double* partials;                   // [chunks of this launch]
  int64_t first[kGradTensors];        // its first chunk, of each tensor
  const void* data[kGradTensors];
  int64_t count[kGradTensors];
  GradKind kind[kGradTensors];
};

// Of all threads of the block, in thread 0.
__device__ __forceinline__ double block_sum(double x) {
  MEGAPRE_SHARED(double, warps, [32]);
  x = warp_fold(x, [](double a, double b) { return a + b; });
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = x;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
      sum += warps[warp];
    }
  }
  return sum;
}

__device__ __forceinline__ uint32_t any_bit(const uint4& bits) {
  return bits.x | bits.y | bits.z | bits.w;
}

// The thread's share of the chunk at `begin`: N neighbours of every 256 N. WHOLE: the chunk is, and it is aligned.
template <bool WHOLE, typename T>
__device__ __forceinline__ double thread_squares(const T* grad, int64_t begin, int64_t count) {
  constexpr int N = kWide<T>, kStep = kGradThreads * N, kAtOnce = 8;
  const int64_t own = begin + int64_t{threadIdx.x} * N;
  float sums[4] = {};
  uint32_t bits = 0;
#pragma unroll 1
  for (int at = 0; at < kGradChunk; at += kAtOnce * kStep) {
    Vector<T, N> x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      x[i] = load_flat<WHOLE, T, N>(grad, own + at + i * kStep, count);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float values[N];
      x[i].to(values);
      bits |= any_bit(x[i].bits);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sums[j % 4] = __fmaf_rn(values[j], values[j], sums[j % 4]);
      }
    }
  }
  const float sum = sums[0] + sums[1] + (sums[2] + sums[3]);
  // Below 1e-30 the sum of 128 squares may have lost some that were below fp32's smallest number. Zeros have no bits but
  // their signs: rows of an embedding without tokens are read once.
  const bool zeros = (bits & (sizeof(T) == 4 ? 0x7FFFFFFFu : 0x7FFF7FFFu)) == 0;
  if (zeros || (sum >= 1e-30f && sum <= std::numeric_limits<float>::max())) {
    return sum;
  }
  double wide = 0;
#pragma unroll 1
  for (int at = 0; at < kGradChunk; at += kStep) {
    float values[N];
    load_flat<WHOLE, T, N>(grad, own + at, count).to(values);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      wide += double{values[j]} * double{values[j]};
    }
  }
  return wide;
}

template <typename T>
__device__ __forceinline__ double chunk_squares(const void* data, int64_t begin, int64_t count) {
  const T* const grad = static_cast<const T*>(data);
  const bool whole = reinterpret_cast<uintptr_t>(grad) % 16 == 0 && begin + kGradChunk <= count;
  return whole ? thread_squares<true>(grad, begin, count) : thread_squares<false>(grad, begin, count);
}

// partials[chunk] = the sum of its squares; block number `chunk` has it.
static __global__ void __launch_bounds__(kGradThreads) square_sums_kernel(const __grid_constant__ GradTable op) {
  const int64_t chunk = blockIdx.x;
  int low = 0, high = op.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (op.first[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = (chunk - op.first[low]) * kGradChunk, count = op.count[low];
  double sum = 0;
  if (op.kind[low] == GradKind::kFloat) {
    sum = chunk_squares<float>(op.data[low], begin, count);
  } else if (op.kind[low] == GradKind::kBFloat16) {
    sum = chunk_squares<bf16>(op.data[low], begin, count);
  } else {
    sum = chunk_squares<fp16>(op.data[low], begin, count);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    op.partials[chunk] = sum;
  }
}

static __global__ void __launch_bounds__(1024) root_kernel(const double* partials, int64_t chunks, float* norm) {
  double sum = 0;
#pragma unroll 8
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += 1024) {
    sum += partials[chunk];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(sqrt(sum));
  }
}

}  // namespace megapre::cuda
