// Backward of layer_norm and rms_norm. The blocks stay: each walks over rows, keeps its share of dweight and dbias in
// registers and writes it once, for column_sum.h to add up. dy and h are read once; 16-bit rows are fetched one ahead.
// Bytes: dy, h (and dh) in, dx out, and a row of fp32 for each block.
//
//   n = (h - mean) rstd,  g = dy weight,  dx = (g - mean(g) - n mean(g n)) rstd + dh;  dweight = sum dy n,  dbias = sum dy
//
// (without the means of h and g for rms_norm).
#pragma once

#include <cstdint>

#include "launch.h"
#include "norm_forward.h"
#include "reduce.h"
#include "vector.h"

namespace megapre::cuda {

// Strides are in elements; rows of dx are `width` apart. weight is T or fp32.
template <typename T>
struct NormBackward {
  bool centred;  // layer_norm
  int64_t rows, width;
  const T* dy;
  int64_t dy_stride;
  const T* dh;  // null: none
  int64_t dh_stride;
  const T* h;
  int64_t h_stride;
  const void* weight;
  bool weight_is_fp32;
  bool has_bias;
  const float* mean;  // null for rms_norm
  const float* rstd;
  T* dx;
  float* partials;  // [1 or, with a bias, 2][parts][width]
  int64_t parts;
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

// Adds up, over the rows that a block has at a time, what each holds for the columns; `held` is shared: [rows][width].
template <int N, int V>
__device__ __forceinline__ void store_partial(
    const float (&sums)[V][N], float* partial, float* held, int width, int thread, int threads, int rows, int group) {
  if (rows == 1) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int at = (thread + v * threads) * N;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (at < width) {
          partial[at + i] = sums[v][i];
        }
      }
    }
    return;
  }
  __syncthreads();  // nobody reads `held` from the sum before any more
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int at = (thread + v * threads) * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at < width) {
        held[group * width + at + i] = sums[v][i];
      }
    }
  }
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < width; column += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int row = 0; row < rows; ++row) {
      sum += held[row * width + column];
    }
    partial[column] = sum;
  }
}

// N and V as in norm_forward_kernel.
template <typename T, int N, int V>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackward<T> op, int warps) {
  constexpr bool kAhead = N > 1 && sizeof(T) == 2;  // fp32 rows fill the registers once
  MEGAPRE_SHARED(typename RowSums<2>::Storage, storage, [1]);
  RowSums<2> sums_over_row(storage[0]);
  const int blocks = static_cast<int>(cluster_blocks()), row_threads = 32 * warps, threads = blocks * row_threads;
  const int rows = static_cast<int>(blockDim.x) / row_threads, group = static_cast<int>(threadIdx.x) / row_threads;
  const int thread = static_cast<int>(cluster_rank() * blockDim.x) + static_cast<int>(threadIdx.x) % row_threads;
  const int64_t part = blockIdx.x / blocks, step = op.parts * rows;
  const int width = static_cast<int>(op.width);

  float dweight[V][N] = {}, dbias[V][N] = {};
  Vector<T, N> dy[V], h[V];
  const auto fetch = [&](int64_t row) {
    const int there = row < op.rows ? width : 0;  // a row that does not exist is empty
    load_row(dy, op.dy + row * op.dy_stride, there, thread, threads);
    load_row(h, op.h + row * op.h_stride, there, thread, threads);
  };
  fetch(part * rows + group);
  // All threads take as many turns: the sums are over the block.
  for (int64_t first = part * rows; first < op.rows; first += step) {
    const int64_t row = first + group;
    const int there = row < op.rows ? width : 0;
    const float rstd = row < op.rows ? op.rstd[row] : 0.0f;
    const float mean = op.centred && row < op.rows ? op.mean[row] : 0.0f;
    Vector<T, N> dh[V], own_dy[V], own_h[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      own_dy[v] = dy[v], own_h[v] = h[v];
    }
    if (op.dh != nullptr) {
      load_row(dh, op.dh + row * op.dh_stride, there, thread, threads);
    }
    if (kAhead) {
      fetch(row + step);
    }

    float totals[2] = {0.0f, 0.0f};  // of g and of g n
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int at = (thread + v * threads) * N;
      if (at < there) {
        float d[N], n[N], weight[N];
        own_dy[v].to(d);
        own_h[v].to(n);
        load_parameter<T, N>(weight, op.weight, op.weight_is_fp32, at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          n[i] = (n[i] - mean) * rstd;
          dweight[v][i] += d[i] * n[i];
          dbias[v][i] += d[i];
          totals[0] += d[i] * weight[i];
          totals[1] += d[i] * weight[i] * n[i];
        }
      }
    }
    sums_over_row(totals, warps);
    const float g_mean = op.centred ? totals[0] / op.width : 0.0f, gn_mean = totals[1] / op.width;
    T* const dx = op.dx + row * op.width;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int at = (thread + v * threads) * N;
      if (at < there) {
        float d[N], n[N], weight[N];
        own_dy[v].to(d);
        own_h[v].to(n);
        load_parameter<T, N>(weight, op.weight, op.weight_is_fp32, at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          n[i] = (n[i] - mean) * rstd;
          d[i] = (d[i] * weight[i] - g_mean - n[i] * gn_mean) * rstd;
        }
        if (op.dh != nullptr) {
          float extra[N];
          dh[v].to(extra);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            d[i] += extra[i];
          }
        }
        Vector<T, N>::from(d).store(dx + at);
      }
    }
    if (!kAhead) {
      fetch(row + step);
    }
  }
  float* const partial = op.partials + part * op.width;
  float* const held = dynamic_shared<float>();
  store_partial(dweight, partial, held, width, thread, threads, rows, group);
  if (op.has_bias) {
    store_partial(dbias, partial + op.parts * op.width, held, width, thread, threads, rows, group);
  }
  sums_over_row.finish();
}

// dx of rows of any width, read twice: what is too wide for registers, where there are no clusters.
template <typename T, int N>
__global__ void __launch_bounds__(512) norm_backward_loop_kernel(NormBackward<T> op) {
  MEGAPRE_SHARED(typename RowSums<2>::Storage, storage, [1]);
  RowSums<2> sums_over_row(storage[0]);
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const float rstd = op.rstd[row], mean = op.centred ? op.mean[row] : 0.0f;
  const auto load = [&](float (&g)[N], float (&n)[N], int64_t at) {
    float weight[N];
    Vector<T, N>::load(op.dy + row * op.dy_stride + at).to(g);
    Vector<T, N>::load(op.h + row * op.h_stride + at).to(n);
    load_parameter<T, N>(weight, op.weight, op.weight_is_fp32, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[i] *= weight[i];
      n[i] = (n[i] - mean) * rstd;
    }
  };
  float totals[2] = {0.0f, 0.0f};
  for (int64_t at = first; at < op.width; at += step) {
    float g[N], n[N];
    load(g, n, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      totals[0] += g[i];
      totals[1] += g[i] * n[i];
    }
  }
  sums_over_row(totals, static_cast<int>(blockDim.x / 32));
  const float g_mean = op.centred ? totals[0] / op.width : 0.0f, gn_mean = totals[1] / op.width;
  for (int64_t at = first; at < op.width; at += step) {
    float g[N], n[N];
    load(g, n, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[i] = (g[i] - g_mean - n[i] * gn_mean) * rstd;
    }
    if (op.dh != nullptr) {
      float extra[N];
      Vector<T, N>::load(op.dh + row * op.dh_stride + at).to(extra);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        g[i] += extra[i];
      }
    }
    Vector<T, N>::from(g).store(op.dx + row * op.width + at);
  }
}

// The partials for the kernel above: N columns a thread, every parts-th row a block.
template <typename T, int N>
__global__ void __launch_bounds__(512) norm_backward_partials_kernel(NormBackward<T> op) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N, part = blockIdx.y;
  if (at >= op.width) {
    return;
  }
  float dweight[N] = {}, dbias[N] = {};
  for (int64_t row = part; row < op.rows; row += op.parts) {
    const float rstd = op.rstd[row], mean = op.centred ? op.mean[row] : 0.0f;
    float d[N], h[N];
    Vector<T, N>::load(op.dy + row * op.dy_stride + at).to(d);
    Vector<T, N>::load(op.h + row * op.h_stride + at).to(h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dweight[i] += d[i] * ((h[i] - mean) * rstd);
      dbias[i] += d[i];
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    op.partials[part * op.width + at + i] = dweight[i];
    if (op.has_bias) {
      op.partials[(op.parts + part) * op.width + at + i] = dbias[i];
    }
  }
}

// 16 warps a block, 16 elements a thread: with dy and h of one row ahead, 32 KiB are under way in each multiprocessor,
// and what the gradients take fits beside them.
inline NormPolicy backward_policy(int64_t width, bool aligned, bool clusters) {
  const auto of = [&](int elements, unsigned blocks) {
    const int warps = max(1, static_cast<int>((width + 32 * elements * blocks - 1) / (32 * elements * blocks)));
    return NormPolicy{elements, warps, blocks == 1 ? 16 / warps : 1, blocks};
  };
  if (!aligned) {  // one element an access: more of them are more addresses than fit
    return width <= 4096 ? of(8, 1) : NormPolicy{0, 16, 1, 1};
  }
  if (width <= 8192) {
    return of(width <= 256 ? 8 : 16, 1);
  }
  for (const unsigned blocks : {2u, 4u, 8u}) {
    if (clusters && width <= 8192 * int64_t{blocks}) {
      return of(16, blocks);
    }
  }
  return {0, 16, 1, 1};
}

// How many rows of partials the kernels for this policy write.
inline int64_t backward_parts(const NormPolicy& p, int64_t rows) {
  const int64_t resident = multiprocessors() / static_cast<int>(p.cluster), needed = (rows + p.rows - 1) / p.rows;
  return max(int64_t{1}, min(resident, needed));
}

template <typename T, int N>
void norm_backward_as(const char* name, const NormPolicy& p, const NormBackward<T>& op, cudaStream_t stream) {
  Launch how{.op = name, .grid = dim3(0), .block = dim3(32 * p.warps * p.rows), .stream = stream};
  if (p.elements == 0) {
    how.grid = dim3(static_cast<unsigned>(op.rows));
    launch(how, norm_backward_loop_kernel<T, N>, op);
    const int64_t strip = int64_t{512} * N;
    how.grid = dim3(static_cast<unsigned>((op.width + strip - 1) / strip), static_cast<unsigned>(op.parts));
    launch(how, norm_backward_partials_kernel<T, N>, op);
    return;
  }
  how.grid = dim3(static_cast<unsigned>(op.parts * p.cluster));
  how.cluster = p.cluster;
  how.shared = p.rows == 1 ? 0 : static_cast<size_t>(p.rows * op.width) * sizeof(float);
  if (p.elements == 8) {
    launch(how, norm_backward_kernel<T, N, 8 / N>, op, p.warps);
  } else if constexpr (N > 1) {
    launch(how, norm_backward_kernel<T, N, 16 / N>, op, p.warps);
  }
}

template <typename T>
void norm_backward(
    const char* name, const NormPolicy& p, const NormBackward<T>& op, bool aligned, cudaStream_t stream) {
  if (aligned) {
    norm_backward_as<T, kWide<T>>(name, p, op, stream);
  } else {
    norm_backward_as<T, 1>(name, p, op, stream);
  }
}

}  // namespace megapre::cuda
