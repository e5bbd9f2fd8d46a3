// Launches without <<<>>>, so that the same source compiles for the emulator, and with their errors checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
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

// A grid of blocks along x, and y. std::invalid_argument, a ValueError, where there are more than a launch can have.
inline dim3 grid_of(const char* op, int64_t blocks, int64_t y = 1) {
  if (blocks > std::numeric_limits<int>::max() || y > 65535) {
    throw std::invalid_argument(
        std::string(op) + ": " + std::to_string(blocks) + " x " + std::to_string(y) +
        " blocks are more than one launch can have (2^31 - 1 x 65535); cut the rows into parts");
  }
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(y));
}

struct Launch {
  const char* op;  // for messages
  dim3 grid;
  dim3 block;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks of a cluster, along x; more than one needs capability 9.0
  cudaStream_t stream = nullptr;
};

// As CUDA takes it; `attribute` must live as long.
inline cudaLaunchConfig_t configured(const Launch& how, cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {how.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  return config;
}

// How many clusters of a launch run at a time: fewer than multiprocessors over blocks, because those of a cluster must lie
// in one group of multiprocessors, and what is left over of a group holds none.
template <typename... Parameters>
int resident_clusters(const Launch& how, void (*kernel)(Parameters...)) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configured(how, attribute);
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), how.op);
  return clusters;
}

// kernel(arguments...), each converted to the type that the kernel declares.
template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (how.shared > 32 * 1024) {  // a kernel may have 48 KiB unasked, with its static arrays
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared)),
        how.op);
  }
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configured(how, attribute);
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), how.op);
}

}  // namespace megapre::cuda
