// Launches without <<<>>>, so that the same source compiles for the emulator, and with their errors checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace megapre::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
  }
}

// An attribute of the current device. The runtime answers from memory; nothing is cached here.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
#ifdef __CUDACC__
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
#endif
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// 80 for sm_80, 90 for sm_90.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
      device_attribute(cudaDevAttrComputeCapabilityMinor);
}

struct Launch {
  const char* op;  // for messages
  dim3 grid;
  dim3 block;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks of a cluster, along x; more than one needs capability 9.0
  cudaStream_t stream = nullptr;
};

// kernel(arguments...), each converted to the type that the kernel declares.
template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (how.shared > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared)),
        how.op);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {how.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), how.op);
}

}  // namespace megapre::cuda
