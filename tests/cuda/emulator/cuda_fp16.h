// fp16 as CUDA names it, by the compiler's own _Float16.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
inline __half __float2half_rn(float x) { return {__builtin_bit_cast(unsigned short, static_cast<_Float16>(x))}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) {  // of a NaN and a number: the number
  return __floats2half2_rn(fmaxf(__half2float(a.x), __half2float(b.x)), fmaxf(__half2float(a.y), __half2float(b.y)));
}
