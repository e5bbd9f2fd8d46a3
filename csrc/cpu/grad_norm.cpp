// Driver of grad_norm: checks, threads, and the sum over blocks in their order.

#include "grad_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "rows.h"

namespace megapre::cpu {
namespace {

at::Tensor grad_norm(at::TensorList grads) {
  int64_t blocks = 0;
  for (const at::Tensor& grad : grads) {
    TORCH_CHECK_TYPE(
        is_supported(grad.scalar_type()), "grad_norm: a gradient is ", grad.scalar_type(),
        "; supported are fp32, bf16, fp16, fp64");
    blocks += at::divup(grad.numel(), kNormBlock);
  }
  std::vector<double> sums(blocks);
  double* next = sums.data();
  const GradNormKernels& kernels = MEGAPRE_CHOOSE(grad_norm_kernels);
  for (const at::Tensor& grad : grads) {
    const at::Tensor flat = grad.contiguous();
    const int64_t count = flat.numel(), own = at::divup(count, kNormBlock);
    at::parallel_for(0, own, grain(kNormBlock), [&](int64_t begin, int64_t end) {
      kernels.squares(flat.scalar_type(), flat.const_data_ptr(), count, begin, end, next);
    });
    next += own;
  }
  double total = 0;
  for (const double sum : sums) {
    total += sum;
  }
  return at::scalar_tensor(static_cast<float>(std::sqrt(total)), at::dtype(at::kFloat));
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("grad_norm", &megapre::cpu::grad_norm);
}
