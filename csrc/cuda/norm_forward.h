// Forward of layer_norm and rms_norm. Each row is read once and kept in registers, 8 to 32 elements a thread; one or more
// warps have a row, and above 16,384 elements the blocks of a cluster. Bytes: x (and residual) in, y (and h) out.
//
// The variance is the mean of the squared distances from the mean, from registers: what sum(h^2) - sum(h)^2 would cancel
// to is not computed.
#pragma once

#include <cstdint>

#include "launch.h"
#include "parameter.h"
#include "reduce.h"
#include "vector.h"

namespace megapre::cuda {

// Strides are in elements; rows of y and h are `width` apart. weight and bias are T or fp32.
template <typename T>
struct NormForward {
  bool centred;  // layer_norm
  int64_t rows, width;
  float eps;
  const T* x;
  int64_t x_stride;
  const T* residual;  // null: none
  int64_t residual_stride;
  const void* weight;
  bool weight_is_fp32;
  const void* bias;  // null: none
  bool bias_is_fp32;
  T* y;
  T* h;         // null without a residual
  float* mean;  // null for rms_norm
  float* rstd;
};

// V vectors of a row, zeros past its width.
template <typename T, int N, int V>
__device__ __forceinline__ void load_row(Vector<T, N> (&out)[V], const T* row, int width, int thread, int threads) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int at = (thread + v * threads) * N;
    out[v] = at < width ? Vector<T, N>::load(row + at) : Vector<T, N>::zeros();
  }
}

template <typename T, int N>
__device__ __forceinline__ void add_to(float (&x)[N], const Vector<T, N>& more) {
  float a[N];
  more.to(a);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] += a[i];
  }
}

// Rounded: what is normalised is what is handed on.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> sum_of(const Vector<T, N>& x, const Vector<T, N>& residual) {
  float a[N];
  x.to(a);
  add_to(a, residual);
  return Vector<T, N>::from(a);
}

template <typename T, int N>
__device__ __forceinline__ void add_to(float& total, const Vector<T, N>& h) {
  float a[N];
  h.to(a);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    total += a[i];
  }
}

template <typename T, int N>
__device__ __forceinline__ void add_squares_to(float& total, const Vector<T, N>& h, float mean) {
  float a[N];
  h.to(a);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    total += (a[i] - mean) * (a[i] - mean);
  }
}

// Of the elements of a row from `at` on.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> normalised(
    const NormForward<T>& op, const Vector<T, N>& h, float mean, float rstd, int64_t at) {
  float a[N], weight[N];
  h.to(a);
  load_parameter<T, N>(weight, op.weight, op.weight_is_fp32, at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    a[i] = (a[i] - mean) * rstd * weight[i];
  }
  if (op.bias != nullptr) {
    float bias[N];
    load_parameter<T, N>(bias, op.bias, op.bias_is_fp32, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] += bias[i];
    }
  }
  return Vector<T, N>::from(a);
}

// N: elements an access, 16 bytes of them or, where rows are not aligned, one. V: accesses a thread.
template <typename T, int N, int V>
__global__ void __launch_bounds__(512) norm_forward_kernel(NormForward<T> op, int warps) {
  MEGAPRE_SHARED(typename RowSums<1>::Storage, storage, [1]);
  RowSums<1> sum_over_row(storage[0], warps);
  const int blocks = static_cast<int>(cluster_blocks()), row_threads = 32 * warps, threads = blocks * row_threads;
  const int64_t row = int64_t{blockIdx.x / blocks} * (blockDim.x / row_threads) + threadIdx.x / row_threads;
  const int width = row < op.rows ? static_cast<int>(op.width) : 0;  // a row that does not exist is empty
  // Of the threads of the row, over all blocks of the cluster.
  const int thread = static_cast<int>(cluster_rank() * blockDim.x + threadIdx.x % row_threads);

  Vector<T, N> h[V];
  load_row(h, op.x + row * op.x_stride, width, thread, threads);
  if (op.residual != nullptr) {
    Vector<T, N> residual[V];
    load_row(residual, op.residual + row * op.residual_stride, width, thread, threads);
    T* const sum = op.h + row * op.width;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      h[v] = sum_of(h[v], residual[v]);
      if (const int at = (thread + v * threads) * N; at < width) {
        h[v].store(sum + at);
      }
    }
  }

  float mean = 0.0f;
  if (op.centred) {
    float total[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      add_to(total[0], h[v]);
    }
    sum_over_row(total);
    mean = total[0] / op.width;
  }
  float squares[1] = {0.0f};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if ((thread + v * threads) * N < width) {
      add_squares_to(squares[0], h[v], mean);
    }
  }
  sum_over_row(squares);
  const float rstd = rsqrtf(squares[0] / op.width + op.eps);

  T* const y = op.y + row * op.width;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (const int at = (thread + v * threads) * N; at < width) {
      normalised(op, h[v], mean, rstd, at).store(y + at);
    }
  }
  if (row < op.rows && thread == 0) {
    op.rstd[row] = rstd;
    if (op.centred) {
      op.mean[row] = mean;
    }
  }
}

// Rows of any width, read twice: what is too wide for registers, where there are no clusters.
template <typename T, int N>
__global__ void __launch_bounds__(512) norm_forward_loop_kernel(NormForward<T> op) {
  MEGAPRE_SHARED(typename RowSums<1>::Storage, storage, [1]);
  RowSums<1> sum_over_row(storage[0], static_cast<int>(blockDim.x / 32));
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const T* const x = op.x + row * op.x_stride;
  const T* const h = op.residual != nullptr ? op.h + row * op.width : x;

  float mean = 0.0f;
  if (op.residual != nullptr || op.centred) {
    float total[1] = {0.0f};
    for (int64_t at = first; at < op.width; at += step) {
      Vector<T, N> own = Vector<T, N>::load(x + at);
      if (op.residual != nullptr) {  // each thread reads again what it has written itself
        own = sum_of(own, Vector<T, N>::load(op.residual + row * op.residual_stride + at));
        own.store(op.h + row * op.width + at);
      }
      add_to(total[0], own);
    }
    if (op.centred) {
      sum_over_row(total);
      mean = total[0] / op.width;
    }
  }
  float squares[1] = {0.0f};
  for (int64_t at = first; at < op.width; at += step) {
    add_squares_to(squares[0], Vector<T, N>::load(h + at), mean);
  }
  sum_over_row(squares);
  const float rstd = rsqrtf(squares[0] / op.width + op.eps);
  for (int64_t at = first; at < op.width; at += step) {
    normalised(op, Vector<T, N>::load(h + at), mean, rstd, at).store(op.y + row * op.width + at);
  }
  if (threadIdx.x == 0) {
    op.rstd[row] = rstd;
    if (op.centred) {
      op.mean[row] = mean;
    }
  }
}

// Which threads have a row of `width` elements.
struct NormPolicy {
  int elements;      // a thread: 8, 16 or 32; 0: the loop
  int warps;         // a row, within one block
  int rows;          // a block
  unsigned cluster;  // blocks a row
};

// As many elements a thread as fill its registers without spills, few enough warps that none is idle. Rows that are not
// aligned are rare: one form for all that are not too wide for it.
inline NormPolicy forward_policy(int64_t width, bool aligned, bool clusters) {
  const auto ceil = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  if (!aligned && width <= 8192) {
    return {16, max(1, ceil(width, 512)), 1, 1};
  }
  if (aligned && width <= 16384) {
    const int elements = width <= 256 ? 8 : width <= 512 ? 16 : 32;
    const int warps = max(1, ceil(width, 32 * elements));
    return {elements, warps, warps >= 4 ? 1 : 4 / warps, 1};
  }
  for (const unsigned blocks : {2u, 4u, 8u}) {
    if (aligned && clusters && width <= 16384 * int64_t{blocks}) {
      return {32, ceil(width, int64_t{32} * 32 * blocks), 1, blocks};
    }
  }
  return {0, 16, 1, 1};
}

template <typename T, int N>
void norm_forward_as(const char* name, const NormForward<T>& op, cudaStream_t stream) {
  const NormPolicy p = forward_policy(op.width, N > 1, capability() >= 90);
  const Launch how{
      .op = name,
      .grid = grid_of(name, (op.rows + p.rows - 1) / p.rows * p.cluster),
      .block = dim3(32 * p.warps * p.rows),
      .cluster = p.cluster,
      .stream = stream};
  if (p.elements == 0) {
    launch(how, norm_forward_loop_kernel<T, N>, op);
  } else if (p.elements == 16) {
    launch(how, norm_forward_kernel<T, N, 16 / N>, op, p.warps);
  } else if constexpr (N > 1) {
    if (p.elements == 32) {
      launch(how, norm_forward_kernel<T, N, 32 / N>, op, p.warps);
    } else {
      launch(how, norm_forward_kernel<T, N, 8 / N>, op, p.warps);
    }
  }
}

// `aligned`: all rows are multiples of 16 bytes.
template <typename T>
void norm_forward(const char* name, const NormForward<T>& op, bool aligned, cudaStream_t stream) {
  if (aligned) {
    norm_forward_as<T, kWide<T>>(name, op, stream);
  } else {
    norm_forward_as<T, 1>(name, op, stream);
  }
}

}  // namespace megapre::cuda
