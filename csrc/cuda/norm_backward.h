// Backward of layer_norm and rms_norm. The blocks stay: each walks over rows, keeps its share of dweight and dbias in
// registers and writes it once, for column_sum.h to add up. dy and h are read once; 16-bit rows are fetched one ahead,
// with their statistics: a turn waits for nothing but the sums over its row.
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
  float per_width;  // 1 / width
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

// N and V as in norm_forward_kernel. What a thread needs of the weight it keeps for all rows.
template <typename T, int N, int V, bool CENTRED>
__global__ void __launch_bounds__(512, 1) norm_backward_kernel(NormBackward<T> op, int warps) {
  constexpr bool kAhead = N > 1 && sizeof(T) == 2;  // fp32 rows fill the registers once
  constexpr int kSums = CENTRED ? 2 : 1;
  MEGAPRE_SHARED(typename RowSums<kSums>::Storage, storage, [1]);
  RowSums<kSums> sums_over_row(storage[0], warps);
  const int blocks = static_cast<int>(cluster_blocks()), row_threads = 32 * warps, threads = blocks * row_threads;
  const int rows = static_cast<int>(blockDim.x) / row_threads, group = static_cast<int>(threadIdx.x) / row_threads;
  const int thread = static_cast<int>(cluster_rank() * blockDim.x) + static_cast<int>(threadIdx.x) % row_threads;
  const int64_t part = blockIdx.x / blocks;
  const int width = static_cast<int>(op.width);

  float weight[V][N] = {}, dweight[V][N] = {}, dbias[V][N] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (const int at = (thread + v * threads) * N; at < width) {
      load_parameter<T, N>(weight[v], op.weight, op.weight_is_fp32, at);
    }
  }
  const int step = static_cast<int>(op.parts) * rows, last = static_cast<int>(op.rows);
  Vector<T, N> dy[V], h[V];
  float mean = 0.0f, rstd = 0.0f;
  const auto fetch = [&](int row) {  // a row that does not exist is empty
    const int there = row < last ? width : 0;
    load_row(dy, op.dy + row * op.dy_stride, there, thread, threads);
    load_row(h, op.h + row * op.h_stride, there, thread, threads);
    rstd = row < last ? op.rstd[row] : 0.0f;
    if constexpr (CENTRED) {
      mean = row < last ? op.mean[row] : 0.0f;
    }
  };
  // All threads take as many turns: the sums are over the block.
  int first = static_cast<int>(part) * rows;
  fetch(first + group);
  for (; first < last; first += step) {
    const int row = first + group;
    const int there = row < last ? width : 0;
    const float own_mean = mean, own_rstd = rstd;
    Vector<T, N> dh[V];
    const T* const dh_row = op.dh + (op.dh != nullptr ? row * op.dh_stride : 0);
    if (kAhead && op.dh != nullptr) {
      load_row(dh, dh_row, there, thread, threads);
    }
    float g[V][N], n[V][N];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dy[v].to(g[v]);
      h[v].to(n[v]);
    }
    if (kAhead) {
      fetch(row + step);
    }

    float totals[kSums] = {};  // of g n and, centred, of g
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {  // g is 0 past the width
        n[v][i] = CENTRED ? (n[v][i] - own_mean) * own_rstd : n[v][i] * own_rstd;
        dweight[v][i] += g[v][i] * n[v][i];
        if constexpr (CENTRED) {
          dbias[v][i] += g[v][i];
        }
        // Rounded once for both of its uses: where all g are equal, their distance from the mean is 0.
        g[v][i] = __fmul_rn(g[v][i], weight[v][i]);
        totals[0] += g[v][i] * n[v][i];
        if constexpr (CENTRED) {
          totals[1] += g[v][i];
        }
      }
    }
    sums_over_row(totals);
    const float gn_mean = totals[0] * op.per_width, g_mean = CENTRED ? totals[kSums - 1] * op.per_width : 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (const int at = (thread + v * threads) * N; at < there) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          g[v][i] = ((CENTRED ? g[v][i] - g_mean : g[v][i]) - n[v][i] * gn_mean) * own_rstd;
        }
        if (op.dh != nullptr) {
          add_to(g[v], kAhead ? dh[v] : Vector<T, N>::load(dh_row + at));
        }
        Vector<T, N>::from(g[v]).store(op.dx + row * op.width + at);
      }
    }
    if (!kAhead) {
      fetch(row + step);
    }
  }
  float* const partial = op.partials + part * op.width;
  float* const held = dynamic_shared<float>();
  store_partial(dweight, partial, held, width, thread, threads, rows, group);
  if (CENTRED && op.has_bias) {
    store_partial(dbias, partial + op.parts * op.width, held, width, thread, threads, rows, group);
  }
}

// dx of rows of any width, read twice: what is too wide for registers, where there are no clusters.
template <typename T, int N>
__global__ void __launch_bounds__(512) norm_backward_loop_kernel(NormBackward<T> op) {
  MEGAPRE_SHARED(typename RowSums<2>::Storage, storage, [1]);
  RowSums<2> sums_over_row(storage[0], static_cast<int>(blockDim.x / 32));
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const float rstd = op.rstd[row], mean = op.centred ? op.mean[row] : 0.0f;
  const auto load = [&](float (&g)[N], float (&n)[N], int64_t at) {
    float weight[N];
    Vector<T, N>::load(op.dy + row * op.dy_stride + at).to(g);
    Vector<T, N>::load(op.h + row * op.h_stride + at).to(n);
    load_parameter<T, N>(weight, op.weight, op.weight_is_fp32, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[i] = __fmul_rn(g[i], weight[i]);
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
  sums_over_row(totals);
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

// The kernel of a policy that has one, for layer_norm and for rms_norm.
template <typename T, int N>
auto backward_kernel(const NormPolicy& p, bool centred) {
  constexpr int kMost = N > 1 ? 16 / N : 8;
  if (p.elements == 8) {
    return centred ? norm_backward_kernel<T, N, 8 / N, true> : norm_backward_kernel<T, N, 8 / N, false>;
  }
  return centred ? norm_backward_kernel<T, N, kMost, true> : norm_backward_kernel<T, N, kMost, false>;
}

// As many rows of partials as blocks, or clusters, run at a time: none waits for another to end.
template <typename T>
int64_t backward_parts(const char* name, const NormPolicy& p, bool centred, int64_t rows) {
  int64_t resident = multiprocessors();
  if (p.cluster > 1) {
    const Launch how{
        .op = name, .grid = dim3(p.cluster), .block = dim3(32 * p.warps * p.rows), .cluster = p.cluster};
    resident = resident_clusters(how, backward_kernel<T, kWide<T>>(p, centred));
  }
  return max(int64_t{1}, min(resident, (rows + p.rows - 1) / p.rows));
}

template <typename T, int N>
void norm_backward_as(const char* name, const NormPolicy& p, const NormBackward<T>& op, cudaStream_t stream) {
  Launch how{.op = name, .grid = dim3(0), .block = dim3(32 * p.warps * p.rows), .stream = stream};
  if (p.elements == 0) {
    how.grid = grid_of(name, op.rows);
    launch(how, norm_backward_loop_kernel<T, N>, op);
    const int64_t strip = int64_t{512} * N;
    how.grid = grid_of(name, (op.width + strip - 1) / strip, op.parts);
    launch(how, norm_backward_partials_kernel<T, N>, op);
    return;
  }
  how.grid = grid_of(name, op.parts * p.cluster);
  how.cluster = p.cluster;
  how.shared = p.rows == 1 ? 0 : static_cast<size_t>(p.rows * op.width) * sizeof(float);
  launch(how, backward_kernel<T, N>(p, op.centred), op, p.warps);
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
