// What tensors, streams and devices are made of: torch's stable C interface.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace megapre::cuda {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

// A new contiguous tensor on the device of `like`, unwritten. Its address is a multiple of 16 bytes.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of a tensor the current one, for the length of an op.
class DeviceGuard {
  CUDAGuardHandle handle_ = nullptr;

 public:
  explicit DeviceGuard(const Tensor& t) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(t.get_device_index(), &handle_));
  }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(handle_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

}  // namespace megapre::cuda
