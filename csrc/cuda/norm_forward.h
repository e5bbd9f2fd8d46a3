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

// N: elements an access, 16 bytes of them or, where rows are not aligned, one. V: accesses a thread.
template <typename T, int N, int V>
__global__ void __launch_bounds__(512) norm_forward_kernel(NormForward<T> op, int warps) {
  MEGAPRE_SHARED(typename RowSums<1>::Storage, storage, [1]);
  RowSums<1> sum_over_row(storage[0]);
  const int blocks = static_cast<int>(cluster_blocks()), row_threads = 32 * warps, threads = blocks * row_threads;
  const int64_t row = int64_t{blockIdx.x / blocks} * (blockDim.x / row_threads) + threadIdx.x / row_threads;
  const int width = row < op.rows ? static_cast<int>(op.width) : 0;  // a row that does not exist is empty
  // Of the threads of the row, over all blocks of the cluster.
  const int thread = static_cast<int>(cluster_rank() * blockDim.x + threadIdx.x % row_threads);

  Vector<T, N> h[V];
  const T* const x = op.x + row * op.x_stride;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int at = (thread + v * threads) * N;
    h[v] = at < width ? Vector<T, N>::load(x + at) : Vector<T, N>::zeros();
  }
  if (op.residual != nullptr) {
    Vector<T, N> residual[V];
    const T* const r = op.residual + row * op.residual_stride;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int at = (thread + v * threads) * N;
      residual[v] = at < width ? Vector<T, N>::load(r + at) : Vector<T, N>::zeros();
    }
    T* const sum = op.h + row * op.width;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int at = (thread + v * threads) * N;
      float a[N], b[N];
      h[v].to(a);
      residual[v].to(b);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        a[i] += b[i];
      }
      h[v] = Vector<T, N>::from(a);  // rounded: what is normalised is what is handed on
      if (at < width) {
        h[v].store(sum + at);
      }
    }
  }

  float mean = 0.0f;
  if (op.centred) {
    float total[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float a[N];
      h[v].to(a);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[0] += a[i];
      }
    }
    sum_over_row(total, warps);
    mean = total[0] / op.width;
  }
  float squares[1] = {0.0f};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if ((thread + v * threads) * N < width) {
      float a[N];
      h[v].to(a);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        squares[0] += (a[i] - mean) * (a[i] - mean);
      }
    }
  }
  sum_over_row(squares, warps);
  const float rstd = rsqrtf(squares[0] / op.width + op.eps);

  T* const y = op.y + row * op.width;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int at = (thread + v * threads) * N;
    if (at < width) {
      float a[N], weight[N];
      h[v].to(a);
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
      Vector<T, N>::from(a).store(y + at);
    }
  }
  if (row < op.rows && thread == 0) {
    op.rstd[row] = rstd;
    if (op.centred) {
      op.mean[row] = mean;
    }
  }
  sum_over_row.finish();
}

// Rows of any width, read twice: what is too wide for registers, where there are no clusters.
template <typename T, int N>
__global__ void __launch_bounds__(512) norm_forward_loop_kernel(NormForward<T> op) {
  MEGAPRE_SHARED(typename RowSums<1>::Storage, storage, [1]);
  RowSums<1> sum_over_row(storage[0]);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const T* const h = op.residual != nullptr ? op.h + row * op.width : op.x + row * op.x_stride;

  float mean = 0.0f;
  for (int64_t at = first; at < op.width; at += step) {
    float a[N];
    Vector<T, N>::load(op.x + row * op.x_stride + at).to(a);
    if (op.residual != nullptr) {  // each thread reads again what it has written itself
      float b[N];
      Vector<T, N>::load(op.residual + row * op.residual_stride + at).to(b);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        a[i] += b[i];
      }
      const Vector<T, N> sum = Vector<T, N>::from(a);
      sum.store(op.h + row * op.width + at);
      sum.to(a);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      mean += a[i];
    }
  }
  if (op.centred) {
    float total[1] = {mean};
    sum_over_row(total, warps);
    mean = total[0] / op.width;
  } else {
    mean = 0.0f;
  }
  float squares[1] = {0.0f};
  for (int64_t at = first; at < op.width; at += step) {
    float a[N];
    Vector<T, N>::load(h + at).to(a);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      squares[0] += (a[i] - mean) * (a[i] - mean);
    }
  }
  sum_over_row(squares, warps);
  const float rstd = rsqrtf(squares[0] / op.width + op.eps);
  for (int64_t at = first; at < op.width; at += step) {
    float a[N], weight[N];
    Vector<T, N>::load(h + at).to(a);
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
    Vector<T, N>::from(a).store(op.y + row * op.width + at);
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
  const int64_t blocks = (op.rows + p.rows - 1) / p.rows * p.cluster;
  const Launch how{
      .op = name,
      .grid = dim3(static_cast<unsigned>(blocks)),
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
