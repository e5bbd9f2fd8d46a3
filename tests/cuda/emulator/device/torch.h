// Emulated csrc/cuda/device/torch.h: tensors lie in guarded memory on the CPU, and there are no streams.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../guard.h"

namespace megapre::cuda {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = count;
    count *= sizes[dim];
  }
  int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  void* data = emulator::allocate(static_cast<size_t>(count) * aoti_torch_dtype_element_size(code));
  return torch::stable::from_blob(data, sizes, strides, like.device(), dtype, [](void* p) { emulator::release(p); });
}

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

}  // namespace megapre::cuda
