// What the driver of adamw_ and adamw_stochastic_ hands to their loops. All pointers are to `count` neighbouring
// elements; lr, step, grad_scale and found_inf have been read and are in the coefficients.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

struct AdamW {
  // Arithmetic is in fp64 where the master is fp64 (then so are moments and gradient), else in fp32.
  c10::ScalarType master_dtype;
  c10::ScalarType moment_dtype;
  c10::ScalarType grad_dtype;
  c10::ScalarType param_dtype;
  void* master;
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;
  void* param;  // null: the master is the parameter
  bool stream;  // param is 16-bit, aligned to 64 bytes and larger than caches: write past them
  double grad_scale;
  double beta1;
  double beta2;
  double eps;
  double decay;       // 1 - lr weight_decay
  double rate;        // lr / (1 - beta1^step)
  double root_scale;  // 1 / sqrt(1 - beta2^step)
  // Of adamw_stochastic_ alone: the counter of its random bits (philox.h). `offset` is the number of element 0.
  uint64_t seed;
  uint32_t step;
  int64_t offset;
};

// A thread's share begins at a multiple of this: of every vector, and of the groups of random numbers.
constexpr int64_t kAdamWCut = 4096;

struct AdamWKernels {
  void (*update)(const AdamW&, int64_t begin, int64_t end);
  // The master is bf16, and everything that is stored in bf16 is rounded up or down at random.
  void (*update_stochastic)(const AdamW&, int64_t begin, int64_t end);
};

MEGAPRE_DECLARE_LEVELS(AdamWKernels, adamw_kernels)

}  // namespace megapre::cpu
