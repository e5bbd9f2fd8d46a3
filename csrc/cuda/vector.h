// Elements of global memory in registers: N neighbours read or written by one access of up to 16 bytes, and their
// conversion to fp32. A vector stays in its dtype, and so in few registers, until it is needed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace megapre::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kWide = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// x as T holds it.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <int BYTES>
struct Bits;
template <>
struct Bits<16> { using type = uint4; };
template <>
struct Bits<8> { using type = uint2; };
template <>
struct Bits<4> { using type = uint32_t; };
template <>
struct Bits<2> { using type = uint16_t; };

template <typename T, int N>
struct Vector {
  using Access = typename Bits<N * static_cast<int>(sizeof(T))>::type;
  Access bits;

  // p is a multiple of the vector's size.
  static __device__ __forceinline__ Vector load(const T* p) {
    return {*reinterpret_cast<const Access*>(p)};
  }

  static __device__ __forceinline__ Vector zeros() {
    return {Access{}};
  }

  __device__ __forceinline__ void store(T* p) const {
    *reinterpret_cast<Access*>(p) = bits;
  }

  __device__ __forceinline__ void to(float (&x)[N]) const {
    if constexpr (N % 2 == 0 && std::is_same_v<T, bf16>) {  // the upper half of an fp32: one instruction each
      uint32_t pairs[N / 2];
      memcpy(pairs, &bits, sizeof(bits));
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        x[i] = __uint_as_float(pairs[i / 2] << 16);
        x[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
      }
    } else {
      T elements[N];
      static_assert(sizeof(elements) == sizeof(bits));
      memcpy(elements, &bits, sizeof(bits));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = to_float(elements[i]);
      }
    }
  }

  static __device__ __forceinline__ Vector from(const float (&x)[N]) {
    T elements[N];
    if constexpr (N % 2 == 0 && std::is_same_v<T, bf16>) {  // two at a time: one instruction
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
        elements[i] = pair.x, elements[i + 1] = pair.y;
      }
    } else if constexpr (N % 2 == 0 && std::is_same_v<T, fp16>) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const __half2 pair = __floats2half2_rn(x[i], x[i + 1]);
        elements[i] = pair.x, elements[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        elements[i] = from_float<T>(x[i]);
      }
    }
    Vector v;
    memcpy(&v.bits, elements, sizeof(elements));
    return v;
  }
};

}  // namespace megapre::cuda
