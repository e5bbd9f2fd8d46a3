// Weights and biases, vectors that every row of an op shares, and their gradients: in the dtype of x or in fp32.
#pragma once

#include <cstdint>

#include "tensor.h"
#include "vector.h"

namespace megapre::cuda {

// The vector as kernels take it: in the dtype of x or in fp32, neighbours, 16-byte aligned.
inline Tensor parameter(const Tensor& vector, const Tensor& x) {
  const bool as_it_is = vector.scalar_type() == x.scalar_type() || vector.scalar_type() == ScalarType::Float;
  Tensor ready = torch::stable::contiguous(as_it_is ? vector : torch::stable::to(vector, ScalarType::Float));
  return is_aligned(ready.data_ptr()) ? ready : torch::stable::clone(ready);
}

// A gradient of a parameter, and whether the kernels write it as fp32; another dtype than theirs is converted afterwards.
struct ParameterGradient {
  Tensor out;
  bool is_fp32;
  ScalarType wanted;

  ParameterGradient(const Tensor& parameter, int64_t width, const Tensor& x)
      : out(empty(x, {width}, parameter.scalar_type() == x.scalar_type() ? x.scalar_type() : ScalarType::Float)),
        is_fp32(out.scalar_type() == ScalarType::Float),
        wanted(parameter.scalar_type()) {}

  Tensor take() const {
    return out.scalar_type() == wanted ? out : torch::stable::to(out, wanted);
  }
};

// N elements of a parameter from element `at` on, which is a multiple of N.
template <typename T, int N>
__device__ __forceinline__ void load_parameter(float (&out)[N], const void* p, bool is_fp32, int64_t at) {
  if (is_fp32) {
    constexpr int kStep = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += kStep) {
      float part[kStep];
      Vector<float, kStep>::load(static_cast<const float*>(p) + at + i).to(part);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        out[i + j] = part[j];
      }
    }
  } else {
    Vector<T, N>::load(static_cast<const T*>(p) + at).to(out);
  }
}

}  // namespace megapre::cuda
