// Kernels of gelu, swiglu and geglu.
//
//   silu(u) = u s(u),  silu'(u) = s (1 + u (1 - s))          with s(v) = 1 / (1 + exp(-v))        (Elfwing et al. 2017)
//   gelu(u) = u Phi(u),  gelu'(u) = Phi + u Phi'                                        (Hendrycks & Gimpel 2016, eq. 2)
//   tanh form: Phi ~ (1 + tanh(z)) / 2 = s(2 z), so with v = 2 z = 2 sqrt(2/pi) (u + 0.044715 u^3), Phi' = s (1 - s) v'
//   gated: y = act(gate) up;  dgate = dy up act'(gate),  dup = dy act(gate)
//
// Bytes    forward: x in, y out; backward: dy and x in, dx out, and dbias, whose partials are a few rows of fp32.
// Floor    bytes / copy rate: swiglu of 8192 x 2 * 14336 in bf16 on an H200, forward 164 us, backward 273 us.
//
// One exponential and one division give a value and its slope. Accesses are of 16 bytes, two vectors of each tensor a
// thread; rows that do not lie at multiples of 16 bytes go by single elements. A block that sums a bias' gradient stays
// with its columns and walks over rows; the sums of its warps, and then those of the blocks, are added in one order.
#pragma once

#include <device/shared.h>

#include <cstdint>
#include <type_traits>

#include "exponential.h"
#include "parameter.h"
#include "vector.h"

namespace megapre::cuda {

enum class Activation { SWIGLU, GEGLU, GELU_TANH, GELU_ERF };

constexpr bool is_gated(Activation activation) {
  return activation == Activation::SWIGLU || activation == Activation::GEGLU;
}

// Strides are in elements; rows of `out` lie one behind another.
template <typename T>
struct ActivationRows {
  int64_t rows, width;  // of y; x is twice as wide if it is gated
  const T* x;
  int64_t x_stride;
  const void* bias;  // null: none
  bool bias_is_fp32;
  const T* dy;  // null: forward
  int64_t dy_stride;
  T* out;           // y or dx
  float* partials;  // [blocks along rows, width], for dbias
};

struct Activated {
  float value, slope;
};

// Unlike fminf and fmaxf it hands NaN on.
__device__ __forceinline__ float at_least(float x, float bound) {
  return x < bound ? bound : x;
}
__device__ __forceinline__ float at_most(float x, float bound) {
  return x > bound ? bound : x;
}

__device__ __forceinline__ Activated silu(float x) {
  const float low = at_least(x, -87.0f), u = at_most(low, 87.0f);
  const float e = exponential(-u), s = __fdividef(1.0f, 1.0f + e);
  return {low * s, fmaf(u * s, e * s, s)};  // 1 - s = e s keeps its digits
}

__device__ __forceinline__ Activated gelu_tanh(float x) {
  constexpr float k = 1.59576912f, cube = 0.044715f * k;                // 2 sqrt(2/pi)
  const float low = at_least(x, -9.9f), u = at_most(low, 9.9f);  // |v| = 85 there
  const float square = u * u;
  const float e = exponential(-u * fmaf(square, cube, k)), s = __fdividef(1.0f, 1.0f + e);
  return {low * s, fmaf(u * fmaf(square, 3.0f * cube, k) * s, e * s, s)};
}

// Phi(-|u|) = exp(-u^2 / 2) t (a1 + t (a2 + ...)) / 2 with t = 1 / (1 + p |u| / sqrt 2): Abramowitz & Stegun 7.1.26, to
// 8e-8 in absolute terms.
__device__ __forceinline__ Activated gelu_erf(float x) {
  const float low = at_least(x, -13.0f), u = at_most(low, 13.0f);
  const float e = exponential(-0.5f * u * u), t = __fdividef(1.0f, fmaf(fabsf(u), 0.231641888f, 1.0f));
  float p = fmaf(t, 0.530702715f, -0.726576014f);
  p = fmaf(fmaf(p, t, 0.710706871f), t, -0.142248368f);
  const float tail = fmaf(p, t, 0.127414796f) * t * e, phi = u >= 0.0f ? 1.0f - tail : tail;
  return {low * phi, fmaf(u * 0.398942280f, e, phi)};
}

template <Activation kActivation>
__device__ __forceinline__ Activated activate(float x) {
  if constexpr (kActivation == Activation::SWIGLU) {
    return silu(x);
  } else if constexpr (kActivation == Activation::GELU_ERF) {
    return gelu_erf(x);
  } else {
    return gelu_tanh(x);
  }
}

// What a thread has of a row: N neighbours from `column` on of y, and of gate and up.
template <Activation kActivation, typename T, int N>
struct Piece {
  int64_t row, column;
  Vector<T, N> x, up, dy;

  __device__ __forceinline__ void load(const ActivationRows<T>& op, bool backward) {
    const T* const from = op.x + row * op.x_stride + column;
    x = Vector<T, N>::load(from);
    if constexpr (is_gated(kActivation)) {
      up = Vector<T, N>::load(from + op.width);
    }
    if (backward) {
      dy = Vector<T, N>::load(op.dy + row * op.dy_stride + column);
    }
  }

  // x, plus the bias.
  __device__ __forceinline__ void argument(const ActivationRows<T>& op, float (&u)[N]) const {
    x.to(u);
    if (!is_gated(kActivation) && op.bias != nullptr) {
      float bias[N];
      load_parameter<T, N>(bias, op.bias, op.bias_is_fp32, column);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        u[i] += bias[i];
      }
    }
  }

  __device__ __forceinline__ void forward(const ActivationRows<T>& op) const {
    float u[N];
    argument(op, u);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      u[i] = activate<kActivation>(u[i]).value;
    }
    if constexpr (is_gated(kActivation)) {
      float other[N];
      up.to(other);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        u[i] *= other[i];
      }
    }
    Vector<T, N>::from(u).store(op.out + row * op.width + column);
  }

  // Leaves dx, of the gate if there is one, in fp32.
  __device__ __forceinline__ void backward(const ActivationRows<T>& op, float (&dx)[N]) const {
    float u[N], d[N];
    argument(op, u);
    dy.to(d);
    if constexpr (is_gated(kActivation)) {
      T* const out = op.out + row * 2 * op.width + column;
      float other[N];
      up.to(other);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Activated gate = activate<kActivation>(u[i]);
        dx[i] = d[i] * other[i] * gate.slope;
        d[i] *= gate.value;
      }
      Vector<T, N>::from(dx).store(out);
      Vector<T, N>::from(d).store(out + op.width);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dx[i] = d[i] * activate<kActivation>(u[i]).slope;
      }
      Vector<T, N>::from(dx).store(op.out + row * op.width + column);
    }
  }
};

// Pieces a thread of activation_kernel; threads a block.
inline constexpr int kPieces = 2, kActivationThreads = 256;

// y, or dx without a bias' gradient. Pieces are counted over all rows, in 32 bits where they are wide: a division each.
template <Activation kActivation, typename T, int N, bool kBackward>
__global__ void __launch_bounds__(kActivationThreads) activation_kernel(ActivationRows<T> op) {
  using Index = std::conditional_t<(N > 1), uint32_t, uint64_t>;
  const Index per_row = static_cast<Index>(op.width / N), all = static_cast<Index>(op.rows) * per_row;
  Piece<kActivation, T, N> pieces[kPieces];
  bool exists[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const uint64_t at = uint64_t{blockIdx.x} * (kPieces * kActivationThreads) + i * kActivationThreads + threadIdx.x;
    exists[i] = at < all;
    if (exists[i]) {
      const Index row = static_cast<Index>(at) / per_row;
      pieces[i].row = row;
      pieces[i].column = int64_t{static_cast<Index>(at) - row * per_row} * N;
      pieces[i].load(op, kBackward);
    }
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (exists[i]) {
      if constexpr (kBackward) {
        float dx[N];
        pieces[i].backward(op, dx);
      } else {
        pieces[i].forward(op);
      }
    }
  }
}

// dx and the partials of dbias: a warp has 32 pieces of a row, the eight warps of a block rows one behind another, and
// the blocks along y of the grid take turns.
template <Activation kActivation, typename T, int N>
__global__ void __launch_bounds__(256) activation_bias_kernel(ActivationRows<T> op) {
  MEGAPRE_SHARED(float, sums, [8][32 * N]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t column = (int64_t{blockIdx.x} * 32 + lane) * N;
  float total[N] = {};
  if (column < op.width) {
#pragma unroll 2
    for (int64_t row = int64_t{blockIdx.y} * 8 + warp; row < op.rows; row += int64_t{gridDim.y} * 8) {
      Piece<kActivation, T, N> piece{.row = row, .column = column};
      piece.load(op, true);
      float dx[N];
      piece.backward(op, dx);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[i] += dx[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[warp][i * 32 + lane] = total[i];
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < 32 * N; at += 256) {
    const int64_t own = (int64_t{blockIdx.x} * 32 + at % 32) * N + at / 32;
    if (own < op.width) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        sum += sums[w][at];
      }
      op.partials[blockIdx.y * op.width + own] = sum;
    }
  }
}

}  // namespace megapre::cuda
