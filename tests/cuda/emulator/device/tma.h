// Emulated csrc/cuda/device/tma.h: a copy is done by the units of asynchronous.h, all of it at one moment.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "mbarrier.h"

namespace megapre::cuda {

struct alignas(64) TensorMap {
  unsigned char* data;
  int64_t sizes[4], strides[3];  // elements; bytes
  int box_rows;

  // Element (c0 .. c3), or null outside of the tensor.
  unsigned char* at(int64_t c0, int64_t c1, int64_t c2, int64_t c3) const {
    const int64_t c[4] = {c0, c1, c2, c3};
    int64_t offset = 2 * c0;
    for (int dim = 0; dim < 4; ++dim) {
      if (c[dim] < 0 || c[dim] >= sizes[dim]) {
        return nullptr;
      }
      offset += dim == 0 ? 0 : c[dim] * strides[dim - 1];
    }
    return data + offset;
  }
};

inline constexpr int kSwizzledRow = 128;

inline TensorMap tensor_map_16bit(
    bool, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows) {
  TensorMap map{static_cast<unsigned char*>(const_cast<void*>(data)), {}, {}, box_rows};
  bool possible = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
  for (int dim = 0; dim < 4; ++dim) {
    map.sizes[dim] = sizes[dim];
    possible &= sizes[dim] >= 1 && sizes[dim] <= int64_t{1} << 32;
  }
  for (int dim = 0; dim < 3; ++dim) {
    map.strides[dim] = strides[dim];
    possible &= strides[dim] % 16 == 0 && strides[dim] > 0 && strides[dim] < int64_t{1} << 40;
  }
  if (!possible) {
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error 1");
  }
  return map;
}

inline void tma_prefetch(const TensorMap*) {}

// f(where in shared memory, where in the tensor or null) for each 16-byte piece of a box.
template <typename F>
void for_pieces(const TensorMap& map, uint32_t place, int c0, int c1, int c2, int c3, F f) {
  for (int row = 0; row < map.box_rows; ++row) {
    for (int piece = 0; piece < 8; ++piece) {
      f(emulator::swizzled(place + row * kSwizzledRow + piece * 16), map.at(c0 + piece * 8, c1 + row, c2, c3));
    }
  }
}

inline void check_box(uint32_t place, const TensorMap& map) {
  if (place % 128 != 0 || place + map.box_rows * kSwizzledRow > emulator::dynamic_shared_bytes()) {
    emulator::fail("a box of the TMA unit at a place that is no multiple of 128 bytes, or past the end");
  }
}

inline void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, int c3) {
  const uint32_t place = shared_address(to);
  check_box(place, *map);
  check_initialised(*barrier);
  emulator::Units* const units = &emulator::units();
  emulator::later(barrier, [=, map = *map] {
    for_pieces(map, place, c0, c1, c2, c3, [&](uint32_t there, const unsigned char* from) {
      unsigned char piece[16] = {};
      if (from != nullptr) {
        std::memcpy(piece, from, 16);
      }
      std::memcpy(units->memory + there, piece, 16);
      std::memcpy(&units->seen[there], piece, 16);
    });
    mbarrier_land(barrier, map.box_rows * kSwizzledRow);
  });
}

inline void tma_load_row(void* to, const void* from, int bytes, Mbarrier* barrier) {
  const uint32_t place = shared_address(to);
  if (place % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes <= 0) {
    emulator::fail("a row for the TMA unit that is no multiple of 16 bytes");
  }
  check_initialised(*barrier);
  emulator::Units* const units = &emulator::units();
  emulator::later(barrier, [=] {
    std::memcpy(units->memory + place, from, bytes);
    std::memcpy(&units->seen[place], from, bytes);
    mbarrier_land(barrier, bytes);
  });
}

// The stores of the running thread, by the address of something that is its own.
struct Stores {};
inline const void* own_stores() { return &emulator::of_thread<Stores>(); }

inline void tma_store(const TensorMap* map, const void* from, int c0, int c1, int c2, int c3) {
  const uint32_t place = shared_address(from);
  check_box(place, *map);
  emulator::Units* const units = &emulator::units();
  emulator::later(own_stores(), [=, map = *map] {
    for_pieces(map, place, c0, c1, c2, c3, [&](uint32_t there, unsigned char* to) {
      if (to != nullptr) {
        std::memcpy(to, &units->seen[there], 16);
      }
    });
  });
}

inline void tma_store_wait() { emulator::finish(own_stores()); }

inline void async_fence() {
  emulator::Units& units = emulator::units();
  std::memcpy(units.seen.data(), units.memory, units.seen.size());
}

}  // namespace megapre::cuda
