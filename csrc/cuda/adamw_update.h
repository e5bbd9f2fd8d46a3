// AdamW on flat state in one launch; the learning rate, the step, the gradient's scale and the flag that skips the update
// are read from device memory.
//
//   g = grad grad_scale;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr wd) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps);   param = p rounded
//
// Bytes: every element is read once and written once.
//
// A thread has four neighbours and those 64 elements further on, which share a counter of random bits (philox.h): eight
// accesses are under way before one is needed, of 16 bytes where the dtype is fp32. The factors of a call are found in
// fp64 by one thread of each block, so blocks stay for several rounds where there is work for it.
#pragma once

#include <device/shared.h>

#include <cmath>
#include <cstdint>

#include "flat.h"
#include "launch.h"
#include "philox.h"

namespace megapre::cuda {

// A number in device memory, fp32 or fp64.
struct Scalar {
  const void* at;  // null: none
  bool is_fp32;

  __device__ __forceinline__ double read() const {
    return is_fp32 ? double{*static_cast<const float*>(at)} : *static_cast<const double*>(at);
  }
};

enum class ParamKind { kNone, kFloat, kBFloat16, kHalf };

struct AdamW {
  int64_t count;
  void* master;
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;
  void* param;  // kNone: the master is the parameter
  ParamKind param_kind;
  bool aligned;  // element i lies at a multiple of four elements if its number is a multiple of four
  Scalar lr, step, grad_scale, found_inf;
  float beta1, rest1, beta2, rest2, eps;
  double log_beta1, log_beta2, weight_decay;
  uint64_t seed;
  int64_t offset;  // the number of element 0
};

constexpr int kAdamWThreads = 256;
constexpr int kAdamWBlocks = 2;   // of a multiprocessor at a time at least: what three would leave of registers spills
constexpr int kAdamWGrid = 16;    // blocks for each multiprocessor: they do not all get the same share of the memory's rate

// What all elements of a call share.
struct AdamWFactors {
  float scale, decay, rate, root_scale;
  uint32_t step;
  bool skip;
};

__device__ __forceinline__ AdamWFactors adamw_factors(const AdamW& op) {
  const double lr = op.lr.read(), step = op.step.read();
  return {
      .scale = op.grad_scale.at == nullptr ? 1.0f : static_cast<float>(op.grad_scale.read()),
      .decay = static_cast<float>(1 - lr * op.weight_decay),
      .rate = static_cast<float>(lr / -expm1(step * op.log_beta1)),
      .root_scale = static_cast<float>(1 / sqrt(-expm1(step * op.log_beta2))),
      .step = static_cast<uint32_t>(static_cast<int64_t>(step)),
      .skip = op.found_inf.at != nullptr && op.found_inf.read() != 0};
}

template <bool WHOLE>
__device__ __forceinline__ void store_param(const AdamW& op, int64_t at, const float (&p)[4]) {
  if (op.param_kind == ParamKind::kBFloat16) {
    store_flat<WHOLE>(static_cast<bf16*>(op.param), at, op.count, Vector<bf16, 4>::from(p));
  } else if (op.param_kind == ParamKind::kHalf) {
    store_flat<WHOLE>(static_cast<fp16*>(op.param), at, op.count, Vector<fp16, 4>::from(p));
  } else if (op.param_kind == ParamKind::kFloat) {
    store_flat<WHOLE>(static_cast<float*>(op.param), at, op.count, Vector<float, 4>::from(p));
  }
}

// Elements at .. at + 3 and at + 64 .. at + 67, of which only WHOLE says that all are there. STOCHASTIC: what is bf16 is
// rounded by the bits of `counter`, the master by stream 0, the moments by 1 and 2.
template <typename Master, typename Moment, typename Grad, bool STOCHASTIC, bool WHOLE>
__device__ __forceinline__ void update_eight(const AdamW& op, const AdamWFactors& told, int64_t at, uint64_t counter) {
  Master* const master = static_cast<Master*>(op.master);
  Moment* const exp_avg = static_cast<Moment*>(op.exp_avg);
  Moment* const exp_avg_sq = static_cast<Moment*>(op.exp_avg_sq);
  Vector<Master, 4> masters[2];
  Vector<Moment, 4> firsts[2], seconds[2];
  Vector<Grad, 4> grads[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = at + 64 * half;
    grads[half] = load_flat<WHOLE, Grad, 4>(static_cast<const Grad*>(op.grad), i, op.count);
    firsts[half] = load_flat<WHOLE, Moment, 4>(exp_avg, i, op.count);
    seconds[half] = load_flat<WHOLE, Moment, 4>(exp_avg_sq, i, op.count);
    masters[half] = load_flat<WHOLE, Master, 4>(master, i, op.count);
  }
  uint4 random[3] = {};
  if constexpr (STOCHASTIC) {
#pragma unroll
    for (uint32_t stream = 0; stream < (sizeof(Moment) == 2 ? 3 : 1); ++stream) {
      random[stream] = philox(op.seed, counter, told.step, stream);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = at + 64 * half;
    float g[4], m[4], v[4], p[4];
    grads[half].to(g);
    firsts[half].to(m);
    seconds[half].to(v);
    masters[half].to(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      g[j] *= told.scale;
      m[j] = __fmaf_rn(op.rest1, g[j], op.beta1 * m[j]);
      v[j] = __fmaf_rn(op.rest2 * g[j], g[j], op.beta2 * v[j]);
      p[j] = __fmaf_rn(p[j], told.decay, -(told.rate * m[j] / __fmaf_rn(sqrtf(v[j]), told.root_scale, op.eps)));
    }
    const auto rounded = [&]<typename T>(const float (&x)[4], const uint4& bits, T*) {
      if constexpr (STOCHASTIC && sizeof(T) == 2) {
        return half == 0 ? round_stochastic(x, bits.x, bits.y) : round_stochastic(x, bits.z, bits.w);
      } else {
        return Vector<T, 4>::from(x);
      }
    };
    store_flat<WHOLE>(exp_avg, i, op.count, rounded(m, random[1], exp_avg));
    store_flat<WHOLE>(exp_avg_sq, i, op.count, rounded(v, random[2], exp_avg_sq));
    store_flat<WHOLE>(master, i, op.count, rounded(p, random[0], master));
    if constexpr (!STOCHASTIC) {
      store_param<WHOLE>(op, i, p);
    }
  }
}

template <typename Master, typename Moment, typename Grad, bool STOCHASTIC>
__global__ void __launch_bounds__(kAdamWThreads, kAdamWBlocks) adamw_kernel(const __grid_constant__ AdamW op) {
  MEGAPRE_SHARED(AdamWFactors, shared_factors, [1]);
  if (threadIdx.x == 0) {
    shared_factors[0] = adamw_factors(op);
  }
  __syncthreads();
  const AdamWFactors told = shared_factors[0];
  if (told.skip) {
    return;
  }
  // Counters of random bits are numbered like the elements, so the first group may begin before element 0.
  const int64_t first = op.offset / kPhiloxGroup * kPhiloxCounters;
  const int64_t end = (op.offset + op.count + kPhiloxGroup - 1) / kPhiloxGroup * kPhiloxCounters;
  for (int64_t counter = first + int64_t{blockIdx.x} * kAdamWThreads + threadIdx.x; counter < end;
       counter += int64_t{gridDim.x} * kAdamWThreads) {
    const int64_t group = counter / kPhiloxCounters;
    const int64_t at = group * kPhiloxGroup + (counter - group * kPhiloxCounters) * 4 - op.offset;
    if (op.aligned && at >= 0 && at + 68 <= op.count) {
      update_eight<Master, Moment, Grad, STOCHASTIC, true>(op, told, at, static_cast<uint64_t>(counter));
    } else {
      update_eight<Master, Moment, Grad, STOCHASTIC, false>(op, told, at, static_cast<uint64_t>(counter));
    }
  }
}

template <typename Master, typename Moment, typename Grad, bool STOCHASTIC>
void update_flat(const char* name, const AdamW& op, cudaStream_t stream) {
  const int64_t groups = (op.offset % kPhiloxGroup + op.count + kPhiloxGroup - 1) / kPhiloxGroup;
  const int64_t blocks = (groups * kPhiloxCounters + kAdamWThreads - 1) / kAdamWThreads;
  const unsigned grid = static_cast<unsigned>(min(blocks, int64_t{kAdamWGrid} * multiprocessors()));
  launch(
      {.op = name, .grid = dim3(grid), .block = dim3(kAdamWThreads), .stream = stream},
      adamw_kernel<Master, Moment, Grad, STOCHASTIC>, op);
}

}  // namespace megapre::cuda
