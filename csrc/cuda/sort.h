// Stable sorting by torch's own op, which stops no host and can be captured in a CUDA graph.
#pragma once

#include <array>
#include <optional>
#include <utility>

#include "tensor.h"

namespace megapre::cuda {

// A vector in rising order, and where each of its elements lay before, int64; equal ones keep their order.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace megapre::cuda
