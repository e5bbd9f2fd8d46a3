// Sums of fp32 partials over their rows, in one fixed order: the last step of a gradient that is a sum over tokens.
#pragma once

#include <cuda_runtime.h>
#include <device/shared.h>

#include <cstdint>

#include "launch.h"
#include "vector.h"

namespace megapre::cuda {

// Up to two sums in one launch: out[i][c] = sum over rows of partials[i][row][c], as T or fp32.
struct ColumnSums {
  const float* partials;  // [outputs][rows][columns]
  int64_t rows, columns;
  void* out[2];
  bool is_fp32[2];
};

// A warp reads 32 neighbouring columns of every 16th row; then the first warp adds what the 16 have.
template <typename T>
__global__ void __launch_bounds__(512) column_sum_kernel(ColumnSums op) {
  MEGAPRE_SHARED(float, sums, [16][32]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const float* const partials = op.partials + blockIdx.y * op.rows * op.columns;
  float sum = 0.0f;
  if (column < op.columns) {
#pragma unroll 4
    for (int64_t row = warp; row < op.rows; row += 16) {
      sum += partials[row * op.columns + column];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < op.columns) {
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < 16; ++w) {
      sum += sums[w][lane];
    }
    // Arguments that are chosen by a number which is not a constant would be copied to local memory.
    void* const out = blockIdx.y == 0 ? op.out[0] : op.out[1];
    if (blockIdx.y == 0 ? op.is_fp32[0] : op.is_fp32[1]) {
      static_cast<float*>(out)[column] = sum;
    } else {
      static_cast<T*>(out)[column] = from_float<T>(sum);
    }
  }
}

template <typename T>
void column_sums(const char* name, const ColumnSums& op, int outputs, cudaStream_t stream) {
  if (op.columns > 0) {
    const dim3 grid = grid_of(name, (op.columns + 31) / 32, outputs);
    launch({.op = name, .grid = grid, .block = dim3(512), .stream = stream}, column_sum_kernel<T>, op);
  }
}

}  // namespace megapre::cuda
