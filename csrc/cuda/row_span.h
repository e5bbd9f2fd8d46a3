// A row of any length at any address as vectors of 16 bytes, and the few elements before and behind them. So rows of
// 50,257 columns, each of which begins elsewhere within 16 bytes, are read and written as fast as rows of 50,304.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vector.h"

namespace megapre::cuda {

// `head` elements up to the first multiple of 16 bytes, `vectors` of N, `tail` elements. Threads 0, 1, ... of the row
// have vectors 0, 1, ... and again from the first thread on; head and tail, at most 2 (N - 1) elements, one a thread.
// With N = 1 there is neither: for rows that have to be walked beside another one that lies otherwise.
template <typename T, int N>
struct RowSpan {
  int head, vectors, tail;

  __device__ __forceinline__ RowSpan(const T* row, int columns) {
    const int behind = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = N == 1 ? 0 : min(columns, (N - behind) % N);
    vectors = (columns - head) / N;
    tail = columns - head - vectors * N;
  }

  // The first column of a vector.
  __device__ __forceinline__ int column(int vector) const {
    return head + vector * N;
  }

  // The column of head or tail that a thread has; -1: none.
  __device__ __forceinline__ int single(int thread) const {
    return thread < head ? thread : thread < head + tail ? vectors * N + thread : -1;
  }

  // Which of the row's threads has a column.
  __device__ __forceinline__ int owner(int column, int threads) const {
    const int vector = (column - head) / N;
    return column < head ? column : vector < vectors ? vector % threads : column - vectors * N;
  }
};

// Zeros in `columns` neighbours.
template <typename T>
__device__ __forceinline__ void write_zeros(T* row, int columns, int thread, int threads) {
  constexpr int N = kWide<T>;
  const RowSpan<T, N> span(row, columns);
  for (int vector = thread; vector < span.vectors; vector += threads) {
    Vector<T, N>::zeros().store(row + span.column(vector));
  }
  if (const int at = span.single(thread); at >= 0) {
    row[at] = from_float<T>(0.0f);
  }
}

}  // namespace megapre::cuda
