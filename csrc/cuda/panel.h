// How wgmma is told where a matrix lies in shared memory: panels of rows of 64 elements, 128 bytes, swizzled as by
// device/tma.h, from a multiple of 1024 bytes on. PTX ISA 8.0, "wgmma", matrix descriptor.
#pragma once

#include <device/mbarrier.h>

#include <cstdint>

namespace megapre::cuda {

// Bytes of a row of a panel, and of the eight rows after which the swizzle repeats.
inline constexpr int kPanelRow = 128, kPanelGroup = 8 * kPanelRow;

// Bits 0-13 address, 16-29 leading and 32-45 stride offset, all in units of 16 bytes; 62-63: 1 is the swizzle of 128 bytes.
struct Panel {
  uint64_t bits;

  // Further by a number of bytes: within a row by the 32 of 16 elements, else by whole groups of 8 rows.
  __device__ __forceinline__ Panel operator+(int bytes) const { return {bits + static_cast<uint64_t>(bytes >> 4)}; }
};

__device__ __forceinline__ Panel panel(const void* p, int leading) {
  return {
      uint64_t{1} << 62 | static_cast<uint64_t>(kPanelGroup >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
      static_cast<uint64_t>((shared_address(p) & 0x3ffff) >> 4)};
}

// Rows are rows of A or columns of B; 16 of the summed elements lie in a row.
__device__ __forceinline__ Panel k_panel(const void* p) {
  return panel(p, 16);  // the leading offset is not used
}

// Rows are summed; 64 columns of B lie in a row, the next 64 columns `next` bytes further.
__device__ __forceinline__ Panel mn_panel(const void* p, int next) {
  return panel(p, next);
}

}  // namespace megapre::cuda
