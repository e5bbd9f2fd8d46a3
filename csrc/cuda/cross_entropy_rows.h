// Kernels of cross_entropy. With lse = log(sum_j exp(x_j)), p_j = exp(x_j - lse), t the label, V the vocabulary, e the
// label smoothing and z the weight of the z-loss (PaLM, Chowdhery et al. 2022, section 5):
//
//   loss     = (1 - e) (lse - x_t) + e (lse - sum_j x_j / V) + z lse^2
//   dx_j     = dloss (p_j (1 + 2 z lse) - e/V - (1 - e) [j = t])
//
// Bytes    losses, or the statistics of a shard: one read. Gradient: one read, one write. In place, all at once: one read
//          and one write, because the row waits in registers until its sum is known.
// Floor    bytes / copy rate: in place 8192 x 131072 bf16 on an H200, 1.0 ms; the two halves of a shard 1.5 ms.
//
// In place, 512 threads hold 8 vectors of 16 bytes each: 64 KiB a block, two blocks a multiprocessor, so that one loads or
// stores while the other one computes; wider rows lie in the blocks of a cluster, up to 512 KiB. What is wider, or wider
// than 64 KiB where there are no clusters, is read a second time, backwards: what was read last is surest to be in L2.
//
// A thread reads what it writes and nothing else, the label's logit too: no barrier is needed between reads and writes.
// Columns from `columns` on are padding: never read, and their gradient is 0. Ignored rows are not read. A label outside
// [0, vocab) that is not ignore_index gives NaN for loss, statistics and gradient: to look for it would stop the host.
#pragma once

#include <cstdint>

#include "row_span.h"
#include "softmax_statistics.h"

namespace megapre::cuda {

// Strides are in elements.
template <typename T>
struct CrossEntropy {
  int64_t vocab;  // columns of a whole row that exist
  int64_t first;  // which of them column 0 is: 0, but for a shard of the columns
  int columns;    // columns that exist here: vocab, but for a shard
  int width;      // columns here with the padding
  const T* logits;
  int64_t stride;
  const int64_t* labels;
  int64_t ignore_index;
  float smoothing, z_loss;
  float* losses;
  float* lse;            // written by the forward, read by the backward
  float* stats;          // of a shard, [rows, 3], or 4 with label smoothing; null: losses and lse are wanted
  const float* dlosses;  // null: 1 for every row
  T* gradient;
  int64_t gradient_stride;
  unsigned zero;  // 0, but the compiler cannot know
};

// Where a row's label lies.
struct Label {
  bool ignored, good;
  int column;  // here; -1: elsewhere

  template <typename T>
  __device__ __forceinline__ Label(const CrossEntropy<T>& op, int64_t row) {
    const int64_t label = op.labels[row];
    ignored = label == op.ignore_index;
    good = label >= 0 && label < op.vocab;
    const int64_t at = good ? label - op.first : -1;
    column = at >= 0 && at < op.columns ? static_cast<int>(at) : -1;
  }
};

// dx_j = exp(x_j - reference) scale - shift, and the label's own element.
struct RowGradient {
  float reference, scale, shift, dloss, z, smoothing;

  // The row's sum of exp(x - reference) is `sum`.
  template <typename T>
  __device__ __forceinline__ RowGradient(
      const CrossEntropy<T>& op, int64_t row, Label label, float reference, float sum, float lse)
      : reference(reference), smoothing(op.smoothing) {
    dloss = !label.good ? NAN : op.dlosses != nullptr ? op.dlosses[row] : 1.0f;
    z = 2.0f * op.z_loss * lse;
    scale = dloss * (1.0f + z) / sum;
    shift = dloss * smoothing / static_cast<float>(op.vocab);
  }

  __device__ __forceinline__ float operator()(float x) const {
    return exponential(x - reference) * scale - shift;
  }

  // p - 1 through expm1: a confident prediction keeps its digits.
  __device__ __forceinline__ float at_label(float log_p) const {
    return dloss * (expm1f(log_p) + z * expf(log_p) + smoothing) - shift;
  }

  template <typename T, int N>
  __device__ __forceinline__ void write(const Vector<T, N>& x, T* out) const {
    float a[N];
    x.to(a);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] = (*this)(a[i]);
    }
    Vector<T, N>::from(a).store(out);
  }

  // V vectors of a row, `threads` apart from the one at `from` on: all are loaded before the first is written.
  template <int V, typename T, int N>
  __device__ __forceinline__ void write_batch(
      const RowSpan<T, N>& span, const T* x, T* out, int from, int threads) const {
    Vector<T, N> batch[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (from + v * threads < span.vectors) {
        batch[v] = Vector<T, N>::load(x + span.column(from + v * threads));
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (from + v * threads < span.vectors) {
        write(batch[v], out + span.column(from + v * threads));
      }
    }
  }
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> of_minus_infinity() {
  float a[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    a[i] = -INFINITY;
  }
  return Vector<T, N>::from(a);
}

// log(sum) stays apart from the maximum: their sum would lose the digits of a small loss.
template <typename T>
__device__ __forceinline__ float row_loss(const CrossEntropy<T>& op, const SoftmaxStatistics& all, float log_sum) {
  const float lse = all.top + log_sum;
  float loss = (all.top - all.at_label) + log_sum;
  if (op.smoothing != 0.0f) {
    loss = (1.0f - op.smoothing) * loss + op.smoothing * (lse - all.plain / static_cast<float>(op.vocab));
  }
  return loss + op.z_loss * lse * lse;
}

// From the thread that has it, the label's logit; NaN from the first one if there is no such label.
template <typename T, int N>
__device__ __forceinline__ float read_label(
    const T* x, const RowSpan<T, N>& span, Label label, int thread, int threads) {
  if (!label.good) {
    return thread == 0 ? NAN : 0.0f;
  }
  return label.column >= 0 && span.owner(label.column, threads) == thread ? to_float(x[label.column]) : 0.0f;
}

// A thread's part of the statistics of a row, V vectors at a time.
template <typename T, int N, int V>
__device__ __forceinline__ SoftmaxStatistics read_row(
    const CrossEntropy<T>& op, const T* x, const RowSpan<T, N>& span, Label label, int thread, int threads) {
  SoftmaxStatistics own;
  for (int from = thread; from < span.vectors; from += V * threads) {
    Vector<T, N> batch[V];
    int present = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int vector = from + v * threads;
      const bool here = vector < span.vectors;
      present += here;
      batch[v] = here ? Vector<T, N>::load(x + span.column(vector)) : of_minus_infinity<T, N>();
    }
    own.add(batch, present, op.smoothing != 0.0f);
  }
  if (const int at = span.single(thread); at >= 0) {
    const Vector<T, 1> single[1] = {Vector<T, 1>::load(x + at)};
    own.add(single, 1, op.smoothing != 0.0f);
  }
  own.at_label = read_label(x, span, label, thread, threads);
  return own;
}

// Losses and lse, or the statistics of a shard. A block has a row, or where rows are few a cluster.
template <typename T>
__global__ void __launch_bounds__(512) cross_entropy_statistics_kernel(CrossEntropy<T> op) {
  MEGAPRE_SHARED(SoftmaxStorage, storage, [1]);
  const int blocks = static_cast<int>(cluster_blocks()), threads = blocks * static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(cluster_rank() * blockDim.x + threadIdx.x);
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks);
  const int numbers = op.smoothing != 0.0f ? 4 : 3;
  const Label label(op, row);
  SoftmaxStatistics all{.top = 0.0f};
  float log_sum = 0.0f, loss = 0.0f;
  if (!label.ignored) {
    const T* const x = op.logits + row * op.stride;
    const RowSpan<T, kWide<T>> span(x, op.columns);
    all = over_row(read_row<T, kWide<T>, 4>(op, x, span, label, thread, threads), storage[0]);
    log_sum = logf(all.sum);
    loss = row_loss(op, all, log_sum);
  }
  if (op.stats == nullptr) {
    if (thread == 0) {
      op.losses[row] = loss;
      op.lse[row] = all.top + log_sum;
    }
  } else if (thread < numbers) {
    op.stats[row * numbers + thread] =
        thread == 0 ? all.top : thread == 1 ? all.sum : thread == 2 ? all.at_label : all.plain;
  }
  if (!label.ignored) {
    leave_row();
  }
}

// Losses and gradient in place of rows that fit into the registers of a block, or of a cluster.
template <typename T>
__global__ void __launch_bounds__(512, 2) cross_entropy_held_kernel(CrossEntropy<T> op) {
  constexpr int N = kWide<T>, V = 8;
  MEGAPRE_SHARED(SoftmaxStorage, storage, [1]);
  const int blocks = static_cast<int>(cluster_blocks()), threads = blocks * static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(cluster_rank() * blockDim.x + threadIdx.x);
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks);
  T* const x = op.gradient + row * op.gradient_stride;
  const Label label(op, row);
  if (label.ignored) {
    write_zeros(x, op.width, thread, threads);
    if (thread == 0) {
      op.losses[row] = 0.0f;
    }
    return;
  }
  const RowSpan<T, N> span(x, op.columns);
  Vector<T, N> held[V];
  int present = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int vector = thread + v * threads;
    const bool here = vector < span.vectors;
    present += here;
    held[v] = here ? Vector<T, N>::load(x + span.column(vector)) : of_minus_infinity<T, N>();
  }
  const int at = span.single(thread);
  const Vector<T, 1> single[1] = {at >= 0 ? Vector<T, 1>::load(x + at) : of_minus_infinity<T, 1>()};
  SoftmaxStatistics own;
  own.add(held, present, op.smoothing != 0.0f);
  own.add(single, at >= 0, op.smoothing != 0.0f);
  own.at_label = read_label(x, span, label, thread, threads);

  const SoftmaxStatistics all = over_row(own, storage[0]);
  const float log_sum = logf(all.sum);
  const RowGradient gradient(op, row, label, softmax_reference(all.top), all.sum, all.top + log_sum);
  // Else the compiler would keep fp32 copies of the row, and eight addresses, in registers that it has not.
  const int same_thread = thread + static_cast<int>(op.zero);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (const int vector = same_thread + v * threads; vector < span.vectors) {
      uint4& bits = held[v].bits;
      bits = make_uint4(bits.x ^ op.zero, bits.y ^ op.zero, bits.z ^ op.zero, bits.w ^ op.zero);
      gradient.write(held[v], x + span.column(vector));
    }
  }
  if (at >= 0) {
    gradient.write(single[0], x + at);
  }
  if (label.column >= 0 && span.owner(label.column, threads) == thread) {
    x[label.column] = from_float<T>(gradient.at_label((all.at_label - all.top) - log_sum));
  }
  write_zeros(x + op.columns, op.width - op.columns, thread, threads);
  if (thread == 0) {
    op.losses[row] = row_loss(op, all, log_sum);
  }
  leave_row();
}

// Losses and gradient in place of rows of any width, read twice.
template <typename T>
__global__ void __launch_bounds__(512) cross_entropy_twice_kernel(CrossEntropy<T> op) {
  constexpr int N = kWide<T>, V = 4;
  MEGAPRE_SHARED(SoftmaxStorage, storage, [1]);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  T* const x = op.gradient + row * op.gradient_stride;
  const Label label(op, row);
  if (label.ignored) {
    write_zeros(x, op.width, thread, threads);
    if (thread == 0) {
      op.losses[row] = 0.0f;
    }
    return;
  }
  const RowSpan<T, N> span(x, op.columns);
  const SoftmaxStatistics all = over_row(read_row<T, N, V>(op, x, span, label, thread, threads), storage[0]);
  const float log_sum = logf(all.sum);
  const RowGradient gradient(op, row, label, softmax_reference(all.top), all.sum, all.top + log_sum);
  const int step = V * threads;
  for (int from = thread + (span.vectors - 1) / step * step; from >= 0; from -= step) {
    gradient.write_batch<V>(span, x, x, from, threads);
  }
  if (const int at = span.single(thread); at >= 0) {
    gradient.write(Vector<T, 1>::load(x + at), x + at);
  }
  if (label.column >= 0 && span.owner(label.column, threads) == thread) {
    x[label.column] = from_float<T>(gradient.at_label((all.at_label - all.top) - log_sum));
  }
  write_zeros(x + op.columns, op.width - op.columns, thread, threads);
  if (thread == 0) {
    op.losses[row] = row_loss(op, all, log_sum);
  }
}

// Accesses of a thread of the gradient's kernel.
template <int N>
inline constexpr int kGradientVectors = N > 1 ? 4 : 16;

// The gradient given lse, in place or not; `blocks` of the grid have a row. N = 1: a row and its gradient lie otherwise.
template <typename T, int N>
__global__ void __launch_bounds__(512) cross_entropy_gradient_kernel(CrossEntropy<T> op, int blocks) {
  constexpr int V = kGradientVectors<N>;
  const int threads = blocks * static_cast<int>(blockDim.x);
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks);
  const int thread = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks) * blockDim.x + threadIdx.x);
  const T* const x = op.logits + row * op.stride;
  T* const out = op.gradient + row * op.gradient_stride;
  const Label label(op, row);
  if (label.ignored) {
    write_zeros(out, op.width, thread, threads);
    return;
  }
  const float lse = op.lse[row];
  const RowGradient gradient(op, row, label, lse, 1.0f, lse);
  const RowSpan<T, N> span(x, op.columns);
  const float at_label = read_label(x, span, label, thread, threads);
  gradient.write_batch<V>(span, x, out, thread, threads);
  if (const int at = span.single(thread); at >= 0) {
    gradient.write(Vector<T, 1>::load(x + at), out + at);
  }
  if (label.column >= 0 && span.owner(label.column, threads) == thread) {
    out[label.column] = from_float<T>(gradient.at_label(at_label - lse));
  }
  write_zeros(out + op.columns, op.width - op.columns, thread, threads);
}

}  // namespace megapre::cuda
