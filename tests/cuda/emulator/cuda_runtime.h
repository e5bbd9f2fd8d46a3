// CUDA's language and the part of its runtime that csrc/cuda uses, on the fibers of machine.h. Add here what a kernel
// needs: one form an operation, with the meaning of the CUDA C++ Programming Guide.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- vector types ---------------------------------------------------------------------------------------------------

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- arithmetic -----------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t{x} * y) >> 32); }

// ---- memory ---------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
void __stcs(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* p, T value) { const T old = *p; *p = old + value; return old; }
template <typename T>
T atomicMax(T* p, T value) { const T old = *p; *p = std::max(old, value); return old; }
template <typename T>
T atomicExch(T* p, T value) { const T old = *p; *p = value; return old; }
template <typename T>
T atomicCAS(T* p, T expected, T value) { const T old = *p; if (old == expected) { *p = value; } return old; }

// ---- barriers and warps ---------------------------------------------------------------------------------------------

inline constexpr int warpSize = 32;
inline void __syncthreads() { emulator::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::from_lane(mask, 0, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int own = static_cast<int>(emulator::lane());
  return emulator::from_lane(mask, value, own / width * width + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int own = static_cast<int>(emulator::lane()), source = own ^ bits;
  return emulator::from_lane(mask, value, source / width <= own / width ? source : own);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = static_cast<int>(emulator::lane()), source = own + static_cast<int>(delta);
  return emulator::from_lane(mask, value, source / width == own / width ? source : own);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = static_cast<int>(emulator::lane()), source = own - static_cast<int>(delta);
  return emulator::from_lane(mask, value, source >= own / width * width ? source : own);
}

// Folds what the lanes of the mask hold, in the order of the lanes.
template <typename T, typename F>
T emulated_fold(unsigned mask, T value, F fold) {
  const unsigned char* all = emulator::meet(mask, &value, sizeof(T));
  T result{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) {
      T other;
      std::memcpy(&other, all + 16 * lane, sizeof(T));
      result = first ? other : fold(result, other);
      first = false;
    }
  }
  return result;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) { return emulated_fold(mask, value, [](T a, T b) { return a + b; }); }
template <typename T>
T __reduce_max_sync(unsigned mask, T value) { return emulated_fold(mask, value, [](T a, T b) { return std::max(a, b); }); }
template <typename T>
T __reduce_min_sync(unsigned mask, T value) { return emulated_fold(mask, value, [](T a, T b) { return std::min(a, b); }); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate != 0 ? 1u << emulator::lane() : 0u;
  return emulated_fold(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- runtime --------------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct { unsigned x, y, z; } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
      : error == cudaErrorInvalidValue         ? "invalid argument"
                                               : "no error";
}
// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
inline int emulated_shared_limit() {
  const int capability = emulator::device.capability;
  return 1024 * (capability == 90 ? 227 : capability == 80 ? 163 : 99);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::device.multiprocessors
      : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulated_shared_limit()
      : attribute == cudaDevAttrComputeCapabilityMajor ? emulator::device.capability / 10
                                                       : emulator::device.capability % 10;
  return cudaSuccess;
}

// What each kernel has been allowed beyond the 48 KiB of dynamic shared memory that every launch may have.
inline std::map<const void*, size_t>& emulated_allowances() {
  static std::map<const void*, size_t> all;
  return all;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  if (bytes > emulated_shared_limit()) {
    return cudaErrorInvalidValue;
  }
  emulated_allowances()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// The multiprocessors of a cluster are neighbours in a group of at most 16; what is left of a group holds none.
template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t* config) {
  const int all = emulator::device.multiprocessors, blocks = static_cast<int>(config->attrs[0].val.clusterDim.x);
  *clusters = all / 16 * (16 / blocks) + all % 16 / blocks;
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  const dim3 g = config->gridDim, b = config->blockDim;
  const auto known = emulated_allowances().find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = std::max<size_t>(48 * 1024, known == emulated_allowances().end() ? 0 : known->second);
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    cluster = config->attrs[i].id == cudaLaunchAttributeClusterDimension ? config->attrs[i].val.clusterDim.x : cluster;
  }
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  const bool possible = g.x > 0 && g.x < 1u << 31 && g.y > 0 && g.y < 65536 && g.z > 0 && g.z < 65536 && threads > 0 &&
      threads <= 1024 && b.z <= 64 && cluster >= 1 && cluster <= 8 && g.x % cluster == 0 &&
      (cluster == 1 || emulator::device.capability >= 90);
  if (!possible) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > allowed) {
    return cudaErrorInvalidValue;
  }
  emulator::run({g, b, config->dynamicSmemBytes, cluster}, [&] { kernel(arguments...); });
  return cudaSuccess;
}
