// Flat memory at any address and of any length, in groups of N neighbours: a group that is whole by one access, one that
// is not by its elements. So a tensor's bits do not depend on where it lies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace megapre::cuda {

// Elements at .. at + N - 1 of base[0 .. count); zeros where there are none. WHOLE: all are there, and aligned.
template <bool WHOLE, typename T, int N>
__device__ __forceinline__ Vector<T, N> load_flat(const T* base, int64_t at, int64_t count) {
  if constexpr (WHOLE) {
    return Vector<T, N>::load(base + at);
  } else {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      elements[i] = at + i >= 0 && at + i < count ? base[at + i] : from_float<T>(0.0f);
    }
    Vector<T, N> v;
    memcpy(&v.bits, elements, sizeof(elements));
    return v;
  }
}

template <bool WHOLE, typename T, int N>
__device__ __forceinline__ void store_flat(T* base, int64_t at, int64_t count, const Vector<T, N>& v) {
  if constexpr (WHOLE) {
    v.store(base + at);
  } else {
    T elements[N];
    memcpy(elements, &v.bits, sizeof(elements));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at + i >= 0 && at + i < count) {
        base[at + i] = elements[i];
      }
    }
  }
}

}  // namespace megapre::cuda
